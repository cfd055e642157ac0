/* y = x S^T + u B^T + bias, S of any support, packed, on the tensor cores of compute capability 9.0.
 *
 * A warp owns 16 rows of S (packed_rows.cuh) and turns 64 columns of them at a time into registers, zeros included: the first
 * factor of the product, of which a warpgroup has 64 rows. x is the second, in shared memory, where a warp of its own
 * brings it.
 *
 * The N rows of x of a block come in BOXES boxes of BOX rows; the last one starts so that it ends with x. Rows beyond the
 * boxes are not there: what lies in their place meets no other row. Blocks of a cluster that differ in their rows of S alone
 * (CLUSTER of them) share their x: each brings some boxes to all. Blocks that differ in their columns (PARTS of them) add up
 * their sums through each other's shared memory.
 *
 * Compiled for: TALL warpgroups of a block below each other, which share x; WIDE that have parts of the columns; N (8 to
 * 128, a power of two); STAGES of 128 columns whose values are copied together, STRIDE bytes of shared memory for a row's;
 * X_STAGES of 64 columns of x; BOX, BOXES, CLUSTER, PARTS; RESIDENT blocks of a multiprocessor that registers are left for;
 * PER_BLOCK values of 64 columns if always the same; RANK (factors or not), EIGHTS (rows of u and B can be read wide); BIAS;
 * HALF.
 *
 * Nothing is read beyond `nonzeros` values, whatever the mask holds.
 */
#include "hopper.cuh"
#include "packed_rows.cuh"

struct Arguments {
  Map x;
  const u64 *words; /* the mask, 64 columns each */
  const u16 *values;
  const int *starts;  /* the first value of each row */
  const u16 *offsets; /* values of the row before each 64 columns */
  const u16 *B, *u, *bias;
  u16 *y;
  long long count, ins, outs, rank, blocks, nonzeros; /* rows of x, columns, rows of S; blocks: words of a row */
};

#define WARPS (4 * TALL * WIDE)
#define THREADS (32 * WARPS + 32)
#define SHARING (128 * TALL) /* threads that share a tile of x */
#define X_STAGE (N * 128)    /* bytes of 64 columns */
#define PAD 68               /* floats between two rows of x in the sums */

extern __shared__ __align__(1024) unsigned char room[]; /* as the product reads tiles */

/* Threads that share x wait for each other; what they wrote to shared memory is there for the tensor cores. */
__device__ __forceinline__ void meet(int name) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(SHARING) : "memory");
}

__device__ __forceinline__ void meet_all() { asm volatile("bar.sync 0;" ::: "memory"); }

/* The sums, and after them the first factor and the tile, as operands. */
#if N == 8
#define LIST L4
#define ENTRIES "{%4, %5, %6, %7}, %8"
#elif N == 16
#define LIST L8
#define ENTRIES "{%8, %9, %10, %11}, %12"
#elif N == 32
#define LIST L16
#define ENTRIES "{%16, %17, %18, %19}, %20"
#elif N == 64
#define LIST L32
#define ENTRIES "{%32, %33, %34, %35}, %36"
#elif N == 128
#define LIST L64
#define ENTRIES "{%64, %65, %66, %67}, %68"
#endif

/* d (64 x N) += a (64 x 16), in registers, times x^T, a tile of N rows. */
__device__ __forceinline__ void multiply_entries(float *d, const u32 *a, u64 x) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n" WIDTH "k16." WIDE_KIND " {" LIST "}, " ENTRIES ", 1, 1, 1, 0;"
               : OPERANDS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x) : "memory");
}

/* The row of x that is row n of a block's tile; `count` if there is none. */
__device__ __forceinline__ int sample_of(int n, int first, int count) {
  return n < BOX * BOXES ? min(first + n / BOX * BOX, count - BOX) + n % BOX : count;
}

#ifdef RANK
/* B's next 64 factors as the first factor of a product. */
__device__ __forceinline__ void read_factors(const Arguments &args, int row, int q, u32 *out) {
  const u16 *from = args.B + (long long)min(row, (int)args.outs - 1) * args.rank;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int at = q + 8 * i;
#ifdef EIGHTS
    out[i] = at < args.rank ? __ldg((const u32 *)(from + at)) : 0;
#else
    out[i] = (at < args.rank ? from[at] : 0) | (u32)(at + 1 < args.rank ? from[at + 1] : 0) << 16;
#endif
  }
}
#endif

/* 64 columns of a warp's 16 rows of S times the tile of x at an address. */
__device__ __forceinline__ void multiply_step(float *sums, u32 a[2][8], u32 at) {
  u64 tile = tile_at<128>(at);
  open_products();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 part[4] = {a[0][2 * k], a[1][2 * k], a[0][2 * k + 1], a[1][2 * k + 1]};
    multiply_entries(sums, part, tile + 2 * k);
  }
  close_products();
}

#ifdef RANK
/* u of the next 64 factors as a tile. */
__device__ __forceinline__ void bring_factors(const Arguments &args, u32 to, int q, int first, int thread) {
  int count = (int)args.count, rank = (int)args.rank;
#ifdef EIGHTS
#pragma unroll
  for (int i = thread; i < N * 8; i += SHARING) {
    int row = i / 8, at = q + i % 8 * 8, sample = sample_of(row, first, count);
    bool there = sample < count && at < rank;
    copy16(to + row * 128 + (i % 8 ^ row % 8) * 16, args.u + (there ? sample * rank + at : 0), there ? 16 : 0);
  }
  end_copies();
#else
  for (int i = thread; i < N * 64; i += SHARING) {
    int row = i / 64, column = i % 64, at = q + column, sample = sample_of(row, first, count);
    u16 value = sample < count && at < rank ? args.u[sample * rank + at] : 0;
    store_value(to + row * 128 + (column / 8 ^ row % 8) * 16 + column % 8 * 2, value);
  }
#endif
}

/* sums += B u^T for 16 rows of S from `top` on, by the threads that share x. */
__device__ __forceinline__ void add_factors(const Arguments &args, u32 tile, int top, int first, int lane, float *sums) {
  u32 entries[2][8];
  for (int q = 0; q < (int)args.rank; q += 64) {
    meet(1); /* the tile has been read */
    bring_factors(args, tile, q, first, threadIdx.x % SHARING);
#pragma unroll
    for (int i = 0; i < 2; i++) read_factors(args, top + lane / 4 + 8 * i, q + 2 * (lane % 4), entries[i]);
    wait_for_copies<0>();
    meet(1);
    multiply_step(sums, entries, tile);
    finish_products<0>();
  }
}
#endif

#if CLUSTER * PARTS > 1
#define IN_CLUSTER __cluster_dims__(CLUSTER, PARTS, 1)
#else
#define IN_CLUSTER
#endif

/* y from the sums of all warpgroups, FP32 in shared memory: (warpgroup, row of x, row of S). Blocks that have parts of the
   columns take turns. */
__device__ __forceinline__ void store_sums(const Arguments &args, int top, int first, int part, int me) {
  const float *sums = (const float *)room;
  for (int i = threadIdx.x + part * THREADS; i < N * 64 * TALL; i += THREADS * PARTS) {
    int n = i / (64 * TALL), row = i % (64 * TALL), sample = sample_of(n, first, (int)args.count);
    if (sample >= args.count || sample < first + n / BOX * BOX || top + row >= args.outs) continue; /* or another box's */
    const float *from = sums + (row / 64 * N + n) * PAD + row % 64;
    float sum = 0;
#if PARTS > 1
#pragma unroll
    for (int block = 0; block < PARTS; block++) {
      u32 there = in_block((u32)__cvta_generic_to_shared(from), block * CLUSTER + me);
#pragma unroll
      for (int k = 0; k < WIDE; k++) {
        float one;
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(one) : "r"(there + 4 * k * TALL * N * PAD) : "memory");
        sum += one;
      }
    }
#else
#pragma unroll
    for (int k = 0; k < WIDE; k++) sum += from[k * TALL * N * PAD];
#endif
#ifdef BIAS
    sum += widen(args.bias[top + row]);
#endif
    args.y[(long long)sample * args.outs + top + row] = narrow(sum);
  }
}

/* sums += S x^T for a warp's 16 rows of S and its part of the columns. `full`, `empty`: barriers of the stages of x; `peers`:
   the first block of the cluster that shares them. */
__device__ __forceinline__ void multiply_rows(Cursor &c, u32 nonzeros, u32 tiles, u32 store, u32 records, u32 full, u32 empty,
                                              int span, int lane, int peers, float *sums) {
  int t = lane % 4, ahead = 0, stage = 0, x_now = 0, x_phase = 0; /* the stages to fill and to multiply */
#pragma unroll 1
  for (; ahead < STAGES - 1; ahead++) {
    prepare(nonzeros, c, store + ahead * VALUE_BYTES, records + ahead * RECORD_BYTES, lane);
    end_copies();
  }
  u32 own_records = keep(lane / 4 * RECORD_STRIDE), below[4], table = keep(0x54102222 ^ lane) ^ lane;
#pragma unroll
  for (int i = 0; i < 4; i++) below[i] = keep((1u << 8 * i + 2 * t) - 1);
  u32 entries[2][2][8];
#pragma unroll 1
  for (int base = 0; base < span; base += WORDS) {
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
      if (word == 0) {
        wait_for_copies<STAGES - 2>();
        __syncwarp(); /* this stage has come, and all have read the one before it */
        prepare(nonzeros, c, store + ahead * VALUE_BYTES, records + ahead * RECORD_BYTES, lane);
        end_copies();
        ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
      }
      u32(*out)[8] = entries[word % 2], from = records + stage * RECORD_BYTES + own_records + 16 * word;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint4 r = load_record(from + 8 * i * RECORD_STRIDE);
        expand_half(r.x, r.z, t, below, table, out[i]);
        expand_half(r.y, r.w, t, below, table, out[i] + 4);
      }
      wait_for(full + 8 * x_now, x_phase);
      multiply_step(sums, out, tiles + x_now * X_STAGE);
      finish_products<1>();
      if (base + word > 0 && lane == 0) { /* the step before this one is done */
        u32 done = empty + 8 * ((x_now == 0 ? X_STAGES : x_now) - 1);
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) arrive_at(in_block(done, peers + i));
      }
      x_now = x_now + 1 == X_STAGES ? 0 : x_now + 1;
      x_phase ^= x_now == 0;
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  finish_products<0>();
  wait_for_copies<0>();
}

/* x of all steps, by one thread. */
__device__ __forceinline__ void bring_x(const Arguments &args, u32 memory, u32 full, u32 empty, int span, int first, int part,
                                        int me) {
  for (int i = 0; i < span * WIDE; i++) {
    int step = i / WIDE, wide = i % WIDE, stage = wide * X_STAGES + step % X_STAGES;
    int column = 64 * ((part * WIDE + wide) * span + step);
    u32 to = memory + stage * X_STAGE, barrier = full + 8 * stage;
    if (step >= X_STAGES) wait_for(empty + 8 * stage, step / X_STAGES - 1 & 1);
    expect(barrier, BOX * BOXES * 128);
#pragma unroll
    for (int k = me; k < BOXES; k += CLUSTER) {
      int row = sample_of(k * BOX, first, (int)args.count);
      u32 place = to + k * (BOX * 128);
      if (CLUSTER > 1) copy_tile_to(place, args.x, column, row, barrier, ((1 << CLUSTER) - 1) << (part * CLUSTER));
      else copy_tile(place, args.x, column, row, barrier);
    }
  }
}

extern "C" __global__ void IN_CLUSTER __launch_bounds__(THREADS, RESIDENT) bitmask(const __grid_constant__ Arguments args) {
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  int group = warp / 4, wide = group / TALL, blocks = (int)args.blocks;
  int top = blockIdx.x * 64 * TALL, own = group % TALL * 64 + warp % 4 * 16, first = blockIdx.z * N;
  int me = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0, part = PARTS > 1 ? blockIdx.y : 0, peers = part * CLUSTER;
  u32 nonzeros = (u32)args.nonzeros, memory = (u32)__cvta_generic_to_shared(room);
  u32 store = memory + WIDE * X_STAGES * X_STAGE, records = store + WARPS * STAGES * VALUE_BYTES;
  u32 lists = records + WARPS * STAGES * RECORD_BYTES;
  u32 full = lists + WARPS * LIST_BYTES, empty = full + 8 * WIDE * X_STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < WIDE * X_STAGES; i++) start_barrier(full + 8 * i, 1), start_barrier(empty + 8 * i, 4 * TALL * CLUSTER);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  store += warp * STAGES * VALUE_BYTES, records += warp * STAGES * RECORD_BYTES, lists += warp * LIST_BYTES;
  /* This warpgroup's words of every row. */
  int span = ((blocks + WIDE * PARTS - 1) / (WIDE * PARTS) + WORDS - 1) / WORDS * WORDS, begin = (part * WIDE + wide) * span;
  long long row = min(top + own + lane % 16, (int)args.outs - 1);
  Cursor c;
  c.words = args.words + row * blocks + begin + lane / 16 * (WORDS / 2);
  c.left = min(span, blocks - begin) - lane / 16 * (WORDS / 2);
#ifdef PER_BLOCK
  c.place = ((u32)row * blocks + begin) * PER_BLOCK;
#else
  c.place = args.starts[row] + (begin < blocks ? args.offsets[row * blocks + begin] : 0);
#endif
  c.place = min(c.place, nonzeros);
  c.values = keep(lane % 16 * STRIDE), c.record = keep(lane % 16 * RECORD_STRIDE + lane / 16 * (8 * WORDS));
  c.listed = keep(lists + lane % 16 * 8), c.copied = keep(lane / 8 * STRIDE + lane % 8 * 16);
  c.further = keep(lane % 16 * STRIDE + lane / 16 * 16);
  c.from = args.values + 8 * (lane % 8), c.more = args.values + 8 * (lane / 16);
  read_masks(c);
#ifdef RANK
  if (wide == 0 && part == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(args.B + row * args.rank));
#endif
  if (CLUSTER > 1) sync_cluster();
  else __syncthreads();
  if (warp == WARPS) {
    if (lane == 0) bring_x(args, memory, full, empty, span, first, part, me);
    __syncwarp();
    meet_all();
  } else {
    u32 tiles = memory + wide * X_STAGES * X_STAGE, own_barriers = 8 * wide * X_STAGES;
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) sums[i] = 0;
    multiply_rows(c, nonzeros, tiles, store, records, full + own_barriers, empty + own_barriers, span, lane, peers, sums);
#ifdef RANK
    asm volatile("griddepcontrol.wait;" ::: "memory"); /* for u, by the launch before this one */
    if (wide == 0 && part == 0) add_factors(args, tiles, top + own, first, lane, sums);
#endif
    settle(sums);
    meet_all(); /* all stages have been read */
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      int n = i / 4 * 8 + 2 * (lane % 4) + i % 2, at = warp % 4 * 16 + lane / 4 + i / 2 % 2 * 8;
      ((float *)room)[(group * N + n) * PAD + at] = sums[i];
    }
  }
  if (CLUSTER * PARTS > 1) sync_cluster();
  else __syncthreads();
  store_sums(args, top, first, part, me);
  if (CLUSTER * PARTS > 1) sync_cluster(); /* nobody's memory goes while others use it */
}
