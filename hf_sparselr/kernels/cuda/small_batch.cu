/* y = x S^T + u B^T + bias for up to 32 rows of x, S packed, on the tensor cores; u = x A^T.
 *
 * A warp owns ROWS rows of S and a part of the columns. It brings the mask and the values of a few columns into
 * registers as the first factor of a product of the tensor cores, zeros included, or at 2:4 as the factor and the
 * metadata of a sparse product. In which order columns are contracted is nobody's business: a thread owns neighbours.
 * The warps of a block add their parts in shared memory, in one order.
 *
 * Compiled for: WEIGHTS that share x, ROWS of S of a warp (16 or 32), WARPS of a block, RESIDENT blocks of a
 * multiprocessor that registers are left for, AHEAD steps whose loads are issued together (1 or 4, for PAIRS), TILES of 8
 * rows of x, PAIRS (2:4), STRIDE bytes of shared memory for a row's values of one step, RANK (factors or not), FOURS (B can be read four
 * entries at a time, BF16), BIAS, HALF (FP16).
 *
 * Nothing is read beyond `nonzeros` values, whatever the mask holds.
 */
#include "tensor_cores.cuh"

struct Weight {
  const u64 *words; /* the mask, 64 columns each */
  const u16 *values;
  const int *starts;    /* the first value of each row; not for PAIRS */
  const u16 *offsets;   /* values of the row before each 64 columns; not for PAIRS */
  const u16 *B, *bias;
  u16 *y;
  long long outs, rank, at; /* at: of the weight in u, in floats */
  long long nonzeros, last; /* last: the first block that is a later weight's */
  const u16 *A;
};

struct Arguments {
  const u16 *x;
  float *u;
  long long count, ins, blocks; /* rows of x, columns, words of a row */
  /* Fused, the first `projecting` blocks compute u, and the others wait for them at their end. Blocks start in order.
     arrived: how many blocks of either kind have ended; the last one sets both to zero for the next launch. */
  u32 *arrived;
  long long projecting;
  Weight weights[WEIGHTS];
};

#define THREADS (32 * WARPS)
#define BATCH (8 * TILES)
#define STAGES 2
#define COLUMNS 128 /* of a step */

#ifdef PAIRS

__device__ __forceinline__ void accumulate(const Weight &w, const Arguments &args, int top, int warp, int lane,
                                           float sums[ROWS / 16][TILES][4]) {
  int g = lane / 4, t = lane % 4, odd = t & 1;
  int steps = (int)args.blocks; /* of 64 columns; the warps take turns, so that a block reads on */
  long long width = args.ins / 2;
  const u64 *words[ROWS / 8];
  const u16 *values[ROWS / 8], *x[TILES];
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) {
    long long row = min(top + 8 * i + g, (int)w.outs - 1);
    words[i] = w.words + row * args.blocks;
    values[i] = w.values + row * width + 8 * t;
  }
#pragma unroll
  for (int i = 0; i < TILES; i++)
    x[i] = args.x + min(8 * i + g, (int)args.count - 1) * args.ins + 16 * (t / 2) + 32 * odd;
#if AHEAD == 1
#pragma unroll 1
#else
#pragma unroll 4
#endif
  for (int step = warp; step < steps; step += WARPS) {
    uint4 kept[ROWS / 8];
    u32 code[ROWS / 16];
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) kept[i] = stream16(values[i] + 32 * step);
#pragma unroll
    for (int i = 0; i < ROWS / 16; i++) {
      u64 upper = __ldg(words[2 * i] + step), lower = __ldg(words[2 * i + 1] + step);
      code[i] = metadata(places((u32)upper, upper >> 32, t) | places((u32)lower, lower >> 32, t) << 16);
    }
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      uint4 near = load16(x[n] + 64 * step), far = load16(x[n] + 64 * step + 8);
      /* Of four groups of four columns, the first half or the second; those of the neighbour's four, too. */
      u32 mine[4] = {odd ? near.y : near.x, odd ? near.w : near.z, odd ? far.y : far.x, odd ? far.w : far.z};
      u32 other[4] = {odd ? near.x : near.y, odd ? near.z : near.w, odd ? far.x : far.y, odd ? far.z : far.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        other[i] = __shfl_xor_sync(~0u, other[i], 1);
        u32 kept_here = mine[i];
        mine[i] = odd ? other[i] : kept_here;
        other[i] = odd ? kept_here : other[i];
      }
#pragma unroll
      for (int i = 0; i < ROWS / 16; i++) {
        uint4 p = kept[2 * i], q = kept[2 * i + 1];
        multiply_sparse<0>(sums[i][n], p.x, q.x, p.y, q.y, mine[0], other[0], mine[1], other[1], code[i]);
        multiply_sparse<1>(sums[i][n], p.z, q.z, p.w, q.w, mine[2], other[2], mine[3], other[3], code[i]);
      }
    }
  }
}

#else

struct Step { /* what is known of 128 columns of a row */
  u32 words[4];
  int offset; /* values of the row before them */
};

__device__ __forceinline__ Step read_step(const u64 *words, const u16 *offsets, int step, int blocks) {
  Step s = {{0, 0, 0, 0}, 0};
  if (2 * step >= blocks) return s;
  u64 first = __ldg(words + 2 * step), second = 2 * step + 1 < blocks ? __ldg(words + 2 * step + 1) : 0;
  s.words[0] = (u32)first, s.words[1] = (u32)(first >> 32), s.words[2] = (u32)second, s.words[3] = (u32)(second >> 32);
#ifdef PER_BLOCK
  s.offset = 2 * step * PER_BLOCK;
#else
  s.offset = __ldg(offsets + 2 * step);
#endif
  return s;
}

__device__ __forceinline__ int kept_of(const Step &s) {
  return __popc(s.words[0]) + __popc(s.words[1]) + __popc(s.words[2]) + __popc(s.words[3]);
}

__device__ __forceinline__ void copy_values(const u16 *values, long long nonzeros, long long place, int kept, u32 to,
                                            int t) {
  long long from = place & ~7ll;
  int vectors = ((int)(place - from) + kept + 7) / 8, left = (int)max(min(nonzeros - from, 1ll << 20), 0ll) - 8 * t;
  const u16 *source = values + from + 8 * t;
#pragma unroll
  for (int i = 0; i < (STRIDE / 16 + 3) / 4; i++) /* nothing is read where no bytes are left */
    if (t + 4 * i < min(vectors, STRIDE / 16)) {
      int bytes = 2 * max(min(left - 32 * i, 8), 0);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + 16 * (t + 4 * i)), "l"(source + 32 * i),
                   "r"(bytes));
    }
}

__device__ __forceinline__ void accumulate(const Weight &w, const Arguments &args, int top, int warp, int lane,
                                           float sums[ROWS / 16][TILES][4]) {
  enum { PARTS = ROWS / 8 };
  int g = lane / 4, t = lane % 4;
  u32 table = (u32)__cvta_generic_to_shared(shared);
  u32 own = table + 128 + warp * (STAGES * ROWS * STRIDE); /* of the warp: (stage, row) */
  int blocks = (int)args.blocks, steps = (blocks + 1) / 2;
  const u64 *words[PARTS];
  long long starts[PARTS];
  const u16 *offsets[PARTS];
  Step masks[STAGES + 1][PARTS]; /* of the steps of this warp from now on; the warps take turns */
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    long long row = min(top + 8 * i + g, (int)w.outs - 1);
    words[i] = w.words + row * blocks;
#ifdef PER_BLOCK
    starts[i] = row * blocks * PER_BLOCK;
#else
    starts[i] = w.starts[row];
    offsets[i] = w.offsets + row * blocks;
#endif
#pragma unroll
    for (int s = 0; s < STAGES; s++) masks[s][i] = read_step(words[i], offsets[i], warp + s * WARPS, blocks);
  }
  const u16 *x[TILES];
#pragma unroll
  for (int i = 0; i < TILES; i++)
    x[i] = args.x + min(8 * i + g, (int)args.count - 1) * args.ins + COLUMNS * warp + 8 * t;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      u32 to = own + (s * ROWS + 8 * i + g) * STRIDE;
      copy_values(w.values, w.nonzeros, starts[i] + masks[s][i].offset, kept_of(masks[s][i]), to, t);
    }
    asm volatile("cp.async.commit_group;");
  }
  int stage = 0;
  for (int step = warp; step < steps; step += WARPS) {
    int next = stage + STAGES - 1;
    next = next >= STAGES ? next - STAGES : next;
    __syncwarp(); /* all have read what was in that stage */
    u32 at[PARTS]; /* of the row's next value, in shared memory */
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      masks[STAGES][i] = read_step(words[i], offsets[i], step + STAGES * WARPS, blocks);
      Step later = masks[STAGES - 1][i];
      u32 row = (8 * i + g) * STRIDE;
      copy_values(w.values, w.nonzeros, starts[i] + later.offset, kept_of(later), own + next * ROWS * STRIDE + row, t);
      at[i] = own + stage * ROWS * STRIDE + row;
      at[i] += ((int)starts[i] + masks[0][i].offset & 7) * 2;
    }
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
    __syncwarp();
#pragma unroll
    for (int word = 0; word < 4; word++) {
      u32 a[PARTS][4];
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        u32 bits = masks[0][i].words[word];
        expand(bits >> 8 * t & 255, at[i] + 2 * __popc(bits & ((1u << 8 * t) - 1)), table, a[i]);
        at[i] += 2 * __popc(bits);
      }
      bool inside = COLUMNS * step + 32 * word + 8 * t < (int)args.ins;
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        uint4 b = inside ? load16(x[n] + 32 * word) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < ROWS / 16; i++) {
          multiply(sums[i][n], a[2 * i][0], a[2 * i + 1][0], a[2 * i][1], a[2 * i + 1][1], b.x, b.y);
          multiply(sums[i][n], a[2 * i][2], a[2 * i + 1][2], a[2 * i][3], a[2 * i + 1][3], b.z, b.w);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++) x[n] += COLUMNS * WARPS;
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
      for (int s = 0; s < STAGES; s++) masks[s][i] = masks[s + 1][i];
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  asm volatile("cp.async.wait_group 0;");
}
#endif

#ifdef RANK
/* u = x A^T: one factor a block, all rows of x. */
__device__ __forceinline__ void project(const Arguments &args, int q, float *parts) {
  int number = 0;
#pragma unroll
  for (int i = 0; i + 1 < WEIGHTS; i++)
    if (number == i && q >= args.weights[i].rank) q -= (int)args.weights[i].rank, number = i + 1;
  const Weight &w = args.weights[number];
  const u16 *A = w.A + q * args.ins;
  for (int base = 0; base < args.count; base += 8) { /* eight rows of x at a time */
    float sums[8] = {};
    for (int k = 8 * threadIdx.x; k < args.ins; k += 8 * THREADS) {
      uint4 a = load16(A + k);
      float wide[8] = {widen(a.x), widen(a.x >> 16), widen(a.y), widen(a.y >> 16),
                       widen(a.z), widen(a.z >> 16), widen(a.w), widen(a.w >> 16)};
#pragma unroll
      for (int n = 0; n < 8; n++) {
        uint4 v = load16(args.x + min(base + n, (int)args.count - 1) * args.ins + k);
        sums[n] += wide[0] * widen(v.x) + wide[1] * widen(v.x >> 16) + wide[2] * widen(v.y) + wide[3] * widen(v.y >> 16);
        sums[n] += wide[4] * widen(v.z) + wide[5] * widen(v.z >> 16) + wide[6] * widen(v.w) + wide[7] * widen(v.w >> 16);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int step = 16; step; step /= 2) sums[n] += __shfl_xor_sync(~0u, sums[n], step);
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int n = 0; n < 8; n++) parts[threadIdx.x / 32 * BATCH + base + n] = sums[n];
  }
  __syncthreads();
  if (threadIdx.x < args.count) {
    float sum = 0;
    for (int i = 0; i < WARPS; i++) sum += parts[i * BATCH + threadIdx.x];
    args.u[w.at + threadIdx.x * w.rank + q] = sum;
  }
}

/* Says that a block has ended. Everything that its threads wrote is seen by who sees this. */
__device__ __forceinline__ void arrive(u32 *counter) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(counter, 1);
}

__device__ __forceinline__ void wait_for_low_rank(const Arguments &args) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory"); /* for the launch before this one, which computed u */
#endif
  if (!args.projecting) return;
  if (threadIdx.x == 0) {
    u32 arrived;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(args.arrived) : "memory");
    while (arrived < args.projecting);
  }
  __syncthreads();
}

/* The last block to come here makes the counters ready for the next launch. */
__device__ __forceinline__ void leave(const Arguments &args) {
  if (!args.projecting || threadIdx.x) return;
  if (atomicAdd(args.arrived + 1, 1) == gridDim.x - args.projecting - 1) {
    args.arrived[0] = args.arrived[1] = 0;
    __threadfence();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) low_rank(const __grid_constant__ Arguments args) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  project(args, blockIdx.x, (float *)shared);
}
#endif

#ifdef FOURS
__device__ __forceinline__ uint2 read_factors(const Weight &w, long long row, int q) {
  return row < w.outs && q < w.rank ? __ldg((const uint2 *)(w.B + row * w.rank + q)) : make_uint2(0, 0);
}

/* Two neighbours as BF16, and what that leaves of them. */
__device__ __forceinline__ void split(float low, float high, u32 &first, u32 &second) {
  u16 a = narrow(low), b = narrow(high);
  first = a | (u32)b << 16;
  second = narrow(low - widen(a)) | (u32)narrow(high - widen(b)) << 16;
}

/* sums += B u for four factors of each thread; u as two terms of 16 bits, which is as good as FP32. */
__device__ __forceinline__ void add_low_rank(const Weight &w, const Arguments &args, int q, int g, const uint2 *factors,
                                             float sums[ROWS / 16][TILES][4]) {
#pragma unroll
  for (int n = 0; n < TILES; n++) {
    float4 u = make_float4(0, 0, 0, 0);
    if (q < w.rank) u = *(const float4 *)(args.u + w.at + min(8 * n + g, (int)args.count - 1) * w.rank + q);
    u32 first[2], second[2];
    split(u.x, u.y, first[0], second[0]);
    split(u.z, u.w, first[1], second[1]);
#pragma unroll
    for (int i = 0; i < ROWS / 16; i++) {
      uint2 p = factors[2 * i], r = factors[2 * i + 1];
      multiply(sums[i][n], p.x, r.x, p.y, r.y, first[0], first[1]);
      multiply(sums[i][n], p.x, r.x, p.y, r.y, second[0], second[1]);
    }
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) small_batch(const __grid_constant__ Arguments args) {
  int number = 0, first = 0, block = blockIdx.x;
#ifdef RANK
  if (block < args.projecting) {
    project(args, block, (float *)shared);
    return arrive(args.arrived);
  }
  block -= (int)args.projecting;
#endif
#pragma unroll
  for (int i = 1; i < WEIGHTS; i++)
    if (block >= args.weights[i - 1].last) number = i, first = (int)args.weights[i - 1].last;
  const Weight &w = args.weights[number];
  int top = ROWS * (block - first), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#ifndef PAIRS
  if (threadIdx.x < 16) ((u32 *)shared)[threadIdx.x] = selectors(threadIdx.x);
  __syncthreads();
#endif
  float sums[ROWS / 16][TILES][4] = {};
#ifdef FOURS
  uint2 factors[ROWS / 8]; /* of B, asked for early: this warp's first 16, of which a thread has four */
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) factors[i] = read_factors(w, top + 8 * i + lane / 4, 16 * warp + 4 * (lane % 4));
#endif
  accumulate(w, args, top, warp, lane, sums);
#ifdef RANK
  wait_for_low_rank(args);
#endif
#ifdef FOURS
  for (int q = 16 * warp; q < w.rank; q += 16 * WARPS) {
    if (q != 16 * warp)
#pragma unroll
      for (int i = 0; i < ROWS / 8; i++) factors[i] = read_factors(w, top + 8 * i + lane / 4, q + 4 * (lane % 4));
    add_low_rank(w, args, q + 4 * (lane % 4), lane / 4, factors, sums);
  }
#endif
  __syncthreads();
  float *parts = (float *)shared; /* (warps, batch, rows) */
#pragma unroll
  for (int i = 0; i < ROWS / 16; i++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int row = 16 * i + lane / 4 + 8 * (j / 2), sample = 8 * n + 2 * (lane % 4) + j % 2;
        parts[(warp * BATCH + sample) * ROWS + row] = sums[i][n][j];
      }
  __syncthreads();
  for (int at = threadIdx.x; at < BATCH * ROWS; at += THREADS) {
    int row = at % ROWS, sample = at / ROWS;
    if (top + row >= w.outs || sample >= args.count) continue;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += parts[i * BATCH * ROWS + at];
#if defined(RANK) && !defined(FOURS)
    for (int q = 0; q < w.rank; q++)
      sum += widen(w.B[(top + row) * w.rank + q]) * args.u[w.at + sample * w.rank + q];
#endif
#ifdef BIAS
    sum += widen(w.bias[top + row]);
#endif
    w.y[sample * w.outs + top + row] = narrow(sum);
  }
#ifdef RANK
  leave(args);
#endif
}
