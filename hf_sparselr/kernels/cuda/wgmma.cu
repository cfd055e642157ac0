/* y = x S^T + u B^T + bias for many rows of x, S packed at 2:4, on the sparse tensor cores of compute capability 9.0; or,
 * with WHOLE, u = x A^T.
 *
 * A block multiplies M = 64 WGS rows of S, 64 a warpgroup, by N rows of x. One thread brings tiles to shared memory, a
 * stage of COLUMNS columns at a time: values of S as they are packed, which is how the product reads them, and x. The
 * mask comes straight to registers, 256 columns at a time, and becomes the codes of the kept columns there. After the
 * last columns come the factors, COLUMNS / 2 a stage: rows of B and of u (with WHOLE: of A and of x), whole.
 *
 * The rows of x of a block lie in groups of BOX; the last group starts so that it ends with x. Blocks of a cluster that
 * differ in their rows of S alone (CLUSTER of them) share their x: each brings some groups to all. Blocks that differ in
 * their columns (PARTS of them) add up their sums through each other's shared memory.
 *
 * Compiled for: WEIGHTS that share x, WGS (1 or 2), N (16 to 256, a power of two), COLUMNS (64 or 128), STAGES, CLUSTER, PARTS, RESIDENT blocks
 * of a multiprocessor that registers are left for, RANK (factors or not), BIAS, HALF, WHOLE.
 */
#include "hopper.cuh"

struct Weight {
  Map values, left, right;
  const u64 *words; /* the mask, 64 columns each */
  const u16 *bias;
  u16 *y;
  long long outs, rank, last; /* rows of S; the first cluster along S that is a later weight's */
  long long unused[2];
};

struct Arguments {
  Map x;
  Weight weights[WEIGHTS]; /* 448 bytes each */
  long long count, ins, span; /* rows of x, columns; span: of a part, 256 columns or stages (WHOLE) */
  long long unused[5];        /* to a multiple of 64 bytes, which the driver reads */
};

#define M (64 * WGS)
#define THREADS (128 * WGS + 32)
#define GROUPS (CLUSTER > 2 ? CLUSTER : 2)
#define BOX (N / GROUPS)
#define BAND (16 / CLUSTER)
#define PER (256 / COLUMNS)  /* stages of 256 columns */
#define VALUES (M * COLUMNS) /* bytes */
#ifdef WHOLE
#define STAGE (VALUES + N * COLUMNS)
#define CODES 0
#else
#define STAGE (VALUES + 2 * N * COLUMNS)
#define CODES (1024 * 4 * WGS) /* twice 512 bytes for each warp */
#endif

__device__ __forceinline__ int start_of(int first, int group, int count) { return min(first + group * BOX, count - BOX); }

/* This block's share of a tile of rows of x or u, WIDTH bytes each. */
__device__ __forceinline__ void bring_rows(const Map &map, u32 to, int width, int column, int first, int count, int me,
                                           int blocks, u32 barrier) {
#pragma unroll
  for (int i = 0; i < GROUPS / CLUSTER; i++) {
    int group = i * CLUSTER + me;
    u32 place = to + group * BOX * width;
    if (CLUSTER > 1) copy_tile_to(place, map, column, start_of(first, group, count), barrier, blocks);
    else copy_tile(place, map, column, start_of(first, group, count), barrier);
  }
}

/* Codes of the kept columns for four words of the mask, 64 columns each, of rows g and g + 8, of which thread t of a quad
   has word t, to the warp's memory. There a thread finds its 16 columns of each word, 128 bytes apart: the first two of a
   quad serve selector 0, the others 1. Through memory, as ptxas lets the products before go on only if the codes of
   the next ones are loaded, not computed. */
__device__ __forceinline__ void translate(u64 upper, u64 lower, u32 to) {
  u32 a = (u32)upper, b = (u32)lower, c = (u32)(upper >> 32), d = (u32)(lower >> 32);
  u32 m0 = metadata(pick(a, b, 0x5410)), m1 = metadata(pick(a, b, 0x7632));
  u32 m2 = metadata(pick(c, d, 0x5410)), m3 = metadata(pick(c, d, 0x7632));
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(m0), "r"(m1), "r"(m2), "r"(m3) : "memory");
  __syncwarp();
}

#if CLUSTER * PARTS > 1
#define IN_CLUSTER __cluster_dims__(CLUSTER, PARTS, 1)
#else
#define IN_CLUSTER
#endif

#if PARTS > 1
/* FP32, a row of x after the other, where the stages were. */
__device__ __forceinline__ void keep_sums(const float *sums, u32 to) {
  asm volatile("bar.sync 1, %0;" ::"n"(128 * WGS) : "memory"); /* all stages have been read */
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    int sample = 8 * (i / 4) + i % 2, across = 8 * (i / 2 % 2);
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + 4 * (sample * (M + 4) + across)), "f"(sums[i]) : "memory");
  }
}

/* Those of all parts for this part's share of the rows of x. */
__device__ __forceinline__ void add_parts(const Weight &weight, u32 memory, int top, int first, int count, int part, int me) {
  int column = threadIdx.x % (M / 4) * 4, at = top + column;
  if (at >= weight.outs) return;
  float more[4] = {};
#ifdef BIAS
#pragma unroll
  for (int j = 0; j < 4; j++) more[j] = widen(weight.bias[min(at + j, (int)weight.outs - 1)]);
#endif
  for (int n = N * part / PARTS + threadIdx.x / (M / 4); n < N * (part + 1) / PARTS; n += 8) {
    int sample = start_of(first, n / BOX, count) + n % BOX;
    if (sample < first + n / BOX * BOX) continue; /* another group's */
    float sum[4] = {more[0], more[1], more[2], more[3]};
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      float4 v;
      asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "r"(in_block(memory + 4 * (n * (M + 4) + column), i * CLUSTER + me)));
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    u16 *y = weight.y + (long long)sample * weight.outs + at;
    if (weight.outs % 4 == 0)
      *(uint2 *)y = make_uint2(narrow(sum[0]) | (u32)narrow(sum[1]) << 16, narrow(sum[2]) | (u32)narrow(sum[3]) << 16);
    else
      for (int j = 0; j < 4; j++)
        if (at + j < weight.outs) y[j] = narrow(sum[j]);
  }
}
#else
/* y of a warpgroup: 64 rows of S from `top` on. Through shared memory, N rows of 128 bytes, whose eight pieces lie in another
   order in every row. */
__device__ __forceinline__ void store_sums(const Weight &weight, float *sums, u32 memory, int top, int first, int count) {
  int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = threadIdx.x / 128, outs = (int)weight.outs;
#ifdef BIAS
  int row = top + 16 * warp + lane / 4;
  float upper = widen(weight.bias[min(row, outs - 1)]), lower = widen(weight.bias[min(row + 8, outs - 1)]);
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] += i / 2 % 2 ? lower : upper;
#endif
  asm volatile("bar.sync 1, %0;" ::"n"(128 * WGS) : "memory"); /* all stages have been read */
  u32 to = memory + (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    u32 pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pair[i] = narrow(sums[8 * n + 2 * i]) | (u32)narrow(sums[8 * n + 2 * i + 1]) << 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + n * 2048), "r"(pair[0]),
                 "r"(pair[1]), "r"(pair[2]), "r"(pair[3]) : "memory");
  }
  asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
  int piece = threadIdx.x % 8, at = top + 8 * piece;
  if (at >= outs) return;
#pragma unroll 4
  for (int n = threadIdx.x % 128 / 8; n < N; n += 16) {
    int sample = start_of(first, n / BOX, count) + n % BOX;
    if (sample < first + n / BOX * BOX) continue; /* another group's */
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(memory + n * 128 + (piece ^ n % 8) * 16));
    u16 *y = weight.y + (long long)sample * outs + at;
    if (outs % 8 == 0) *(uint4 *)y = v;
    else {
      u32 words[4] = {v.x, v.y, v.z, v.w};
      for (int j = 0; j < 8; j++)
        if (at + j < outs) y[j] = (u16)(words[j / 2] >> 16 * (j % 2));
    }
  }
}
#endif

extern "C" __global__ void IN_CLUSTER __launch_bounds__(THREADS, RESIDENT) wgmma(const __grid_constant__ Arguments args) {
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, count = (int)args.count; /* a uniform warp */
  int me = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0, part = PARTS > 1 ? blockIdx.y : 0, peers = part * CLUSTER;
  int high = PARTS > 1 ? gridDim.z : gridDim.y, wide = gridDim.x / CLUSTER;
  /* BAND neighbours along S, then the next rows of x: what is at work together is in the cache together. */
  int tile = (PARTS > 1 ? blockIdx.z : blockIdx.y) * wide + blockIdx.x / CLUSTER;
  int band = tile / (BAND * high), rest = tile - band * BAND * high, width = min(BAND, wide - band * BAND);
  int place = band * BAND + rest % width, number = 0, first = rest / width * N;
#pragma unroll
  for (int i = 1; i < WEIGHTS; i++) number += place >= args.weights[i - 1].last;
  const Weight &weight = args.weights[number];
  int top = ((place - (number ? (int)args.weights[number - 1].last : 0)) * CLUSTER + me) * M;
  int begin = 0, end = 0, from = 0, more = 0; /* of 256 columns; of the stages of factors */
#ifdef RANK
  more = (int)(weight.rank + COLUMNS / 2 - 1) / (COLUMNS / 2);
#endif
#ifdef RANK
  asm volatile("griddepcontrol.launch_dependents;"); /* what waits for its u may start beside this */
#endif
#ifdef WHOLE
  from = part * (int)args.span, more = max(min(more - from, (int)args.span), 0);
#else
  begin = part * (int)args.span, end = min(begin + (int)args.span, ((int)args.ins + 255) / 256);
  if (part < PARTS - 1) more = 0; /* the last part has the fewest columns */
#endif
  int steps = max(end - begin, 0) * PER;
  u32 memory = ((u32)__cvta_generic_to_shared(shared) + 1023) / 1024 * 1024;
  u32 full = memory + STAGES * STAGE + CODES, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) start_barrier(full + 8 * s, 1), start_barrier(empty + 8 * s, CLUSTER * WGS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CLUSTER > 1) sync_cluster();
  else __syncthreads();

  if (warp == 4 * WGS) {
    int all = (1 << CLUSTER) - 1 << peers;
    for (int i = 0; i < steps + more && lane == 0; i++) {
      int s = i % STAGES;
      u32 at = memory + s * STAGE, barrier = full + 8 * s;
      if (i >= STAGES) wait_for(empty + 8 * s, i / STAGES - 1 & 1);
#ifndef WHOLE
      if (i < steps) {
        int column = begin * 256 + i * COLUMNS;
        expect(barrier, STAGE);
        copy_tile(at, weight.values, column / 2, top, barrier);
#pragma unroll
        for (int half = 0; half < COLUMNS / 64; half++)
          bring_rows(args.x, at + VALUES + half * 128 * N, 128, column + 64 * half, first, count, me, all, barrier);
        continue;
      }
#endif
#ifdef RANK
      int factor = (from + i - steps) * (COLUMNS / 2);
      expect(barrier, VALUES + N * COLUMNS);
      copy_tile(at, weight.left, factor, top, barrier);
#ifndef WHOLE
      if (i == steps) asm volatile("griddepcontrol.wait;" ::: "memory"); /* for u, by the launch before this one */
#endif
      bring_rows(weight.right, at + VALUES, COLUMNS, factor, first, count, me, all, barrier);
#endif
    }
    __syncwarp();
  } else {
    int group = warp / 4, g = lane / 4, t = lane % 4, s = 0, parity = 0, before = -1;
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) sums[i] = 0;
    auto next = [&] { /* frees the stage before this one, whose products have ended */
      if (before >= 0 && threadIdx.x % 128 < CLUSTER) arrive_at(in_block(empty + 8 * before, peers + threadIdx.x % 128));
      before = s;
      if (++s == STAGES) s = 0, parity ^= 1;
    };
#ifndef WHOLE
    int row = top + 16 * warp + g, words = ((int)args.ins + 63) / 64;
    const u64 *upper = weight.words + (long long)min(row, (int)weight.outs - 1) * words;
    const u64 *lower = weight.words + (long long)min(row + 8, (int)weight.outs - 1) * words;
    auto mask = [&](const u64 *of, int chunk) { return 4 * chunk + t < words ? __ldg(of + 4 * chunk + t) : 0; };
    u32 codes = memory + STAGES * STAGE + warp * 1024;
    u64 now[2] = {mask(upper, begin), mask(lower, begin)}, later[2] = {mask(upper, begin + 1), mask(lower, begin + 1)};
    translate(now[0], now[1], codes + t * 128 + g * 16);
#pragma unroll 1
    for (int chunk = begin; chunk < end; chunk++) {
      now[0] = later[0], now[1] = later[1], later[0] = mask(upper, chunk + 2), later[1] = mask(lower, chunk + 2);
#pragma unroll
      for (int i = 0; i < PER; i++) {
        wait_for(full + 8 * s, parity);
        u32 at = memory + s * STAGE, code[COLUMNS / 64];
        u64 p = tile_at<COLUMNS>(at + group * (VALUES / WGS)), q = tile_at<128>(at + VALUES);
#pragma unroll
        for (int half = 0; half < COLUMNS / 64; half++)
          code[half] = load_word(codes + lane * 4 + (i * COLUMNS / 64 + half) * 128);
        open_products();
#pragma unroll
        for (int half = 0; half < COLUMNS / 64; half++) {
          multiply_pairs<0>(sums, p + 4 * half, q + 8 * N * half, code[half]);
          multiply_pairs<1>(sums, p + 4 * half + 2, q + 8 * N * half + 4, code[half]);
        }
        close_products();
        finish_products<1>();
        next();
      }
      codes ^= 512;
      translate(now[0], now[1], codes + t * 128 + g * 16);
    }
#endif
#ifdef RANK
#pragma unroll 1
    for (int i = 0; i < more; i++) {
      wait_for(full + 8 * s, parity);
      u32 at = memory + s * STAGE;
      u64 p = tile_at<COLUMNS>(at + group * (VALUES / WGS)), q = tile_at<COLUMNS>(at + VALUES);
      open_products();
#pragma unroll
      for (int k = 0; k < COLUMNS / 32; k++) multiply_wide(sums, p + 2 * k, q + 2 * k);
      close_products();
      finish_products<1>();
      next();
    }
#endif
    settle(sums);
#if PARTS > 1
    keep_sums(sums, memory + 4 * (2 * t * (M + 4) + 16 * warp + g));
#else
    store_sums(weight, sums, memory + group * 128 * N, top + 64 * group, first, count);
#endif
  }
#if PARTS > 1
  sync_cluster();
  if (warp < 4 * WGS) add_parts(weight, memory, top, first, count, part, me);
#endif
  if (CLUSTER * PARTS > 1) meet_cluster(); /* no block leaves while another reads its memory or arrives at its barriers */
}
