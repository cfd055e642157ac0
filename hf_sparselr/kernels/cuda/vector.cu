/* y = x S^T + u B^T + bias for up to four rows of x, S of any support, packed, on the tensor cores.
 *
 * A warp owns a slice of the columns, whose x it keeps in registers, and takes two rows of S at a time. A lane has four
 * neighbours of 128 columns, so that the values that lanes read are neighbours in shared memory. To the tensor cores eight
 * pieces of a row of S look like eight rows, and the same pieces of x like eight columns: of the product only the diagonal
 * counts.
 *
 * Compiled for: WEIGHTS that share x; SLICES of STEPS (1 to 8) times 128 columns; GROUPS of warps that take turns with pairs of rows; TOP rows of
 * S of a block (even, at most 32 GROUPS); BATCH rows of x; STAGES of a pair of rows that are under way; STRIDE bytes of
 * shared memory for a row's values; PER_BLOCK values of 64 columns if always the same; RANK (factors or not), EIGHTS (rows of
 * u and B can be read eight entries at a time); BIAS; HALF.
 *
 * Nothing is read beyond `nonzeros` values, whatever the mask holds.
 */
#include "tensor_cores.cuh"

struct Weight {
  const u32 *words; /* the mask, 32 columns each */
  const u16 *values;
  const int *starts;  /* the first value of each row */
  const u16 *offsets; /* values of the row before each 64 columns */
  const u16 *B, *u, *bias;
  u16 *y;
  long long outs, rank, nonzeros, last; /* last: the first block that is a later weight's */
};

struct Arguments {
  const u16 *x;
  long long count, ins, blocks; /* rows of x, columns, words of 64 columns of a row */
  Weight weights[WEIGHTS];
};

#define WARPS (SLICES * GROUPS)
#define THREADS (32 * WARPS)
#define TABLE 128               /* bytes before everything else, of which the first half is a table of selectors */
#define STAGE (2 * STRIDE)      /* bytes: the values of two rows */
#define OWN (STAGES * STAGE + 512) /* of a warp: stages, and where the values of each 32 columns lie */

/* Lane i has these of the warp's row i and its slice. */
struct Places {
  u32 start;       /* the row's first value */
  u32 first, last; /* the slice's, and the one after it */
};

__device__ __forceinline__ Places find_places(const Weight &w, int row, int slice, int blocks) {
  u32 nonzeros = (u32)w.nonzeros;
  Places p = {nonzeros, nonzeros, nonzeros};
  int begin = 2 * STEPS * slice, end = min(begin + 2 * STEPS, blocks);
#ifdef PER_BLOCK
  p.start = (u32)row * blocks * PER_BLOCK;
  p.first = p.start + begin * PER_BLOCK, p.last = p.start + end * PER_BLOCK;
#else
  p.start = w.starts[row];
  p.first = p.start + w.offsets[(long long)row * blocks + begin];
  if (end < blocks) p.last = p.start + w.offsets[(long long)row * blocks + end];
  else if (row + 1 < w.outs) p.last = w.starts[row + 1];
#endif
  return p;
}

/* Has the values of the warp's rows 2 i and 2 i + 1 copied to a stage. `tail`: some may be of the last eight values of all,
   which are copied one by one. */
__device__ __forceinline__ void bring(const u16 *values, u32 nonzeros, const Places &places, bool tail, int i, u32 to,
                                      int lane) {
  u32 whole = nonzeros & ~7u;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 first = __shfl_sync(~0u, places.first, 2 * i + half), last = __shfl_sync(~0u, places.last, 2 * i + half);
    u32 from = first & ~7u, until = min(min(last, whole), from + STRIDE / 2), at = from + 8 * lane;
    const u16 *source = values + at;
#pragma unroll
    for (int k = 0; k < (STRIDE / 16 + 31) / 32; k++)
      copy_if(to + half * STRIDE + 512 * k, source + 256 * k, at + 256 * k < until);
    if (tail)
#pragma unroll 1
      for (u32 j = max(from, whole) + lane; j < min(last, from + STRIDE / 2); j += 32)
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(to - 16 * lane + half * STRIDE + 2 * (j - from)), "h"(values[j])
                     : "memory");
  }
  end_copies();
}

/* Masks of a lane's 32 columns of two rows, and how many values of these rows come before them, to an even word. */
struct Masks {
  u32 upper, lower, before_upper, before_lower;
};

/* `words`, `offsets`: of the first row; `next`: words of 64 columns to the second one. */
__device__ __forceinline__ Masks read_masks(const u32 *words, const u16 *offsets, long long next, bool inside) {
  Masks m = {0, 0, 0, 0};
  if (!inside) return m;
  m.upper = __ldg(words), m.lower = __ldg(words + 2 * next);
#ifndef PER_BLOCK
  m.before_upper = __ldg(offsets), m.before_lower = __ldg(offsets + next);
#endif
  return m;
}

/* Writes down for each 32 columns of two rows: their masks, and where in shared memory their values begin. */
__device__ __forceinline__ void record(const Masks &m, u32 to, u32 above, u32 under, u32 nowhere, bool inside, int lane) {
  u32 before = __shfl_up_sync(~0u, __popc(m.upper) + (__popc(m.lower) << 16), 1);
  if (lane % 2 == 0) before = 0;
  above += 2 * (m.before_upper + (before & 0xFFFF)), under += 2 * (m.before_lower + (before >> 16));
  if (!inside) above = under = nowhere; /* what is read there does not count */
  *(uint4 *)(shared + to + 16 * lane) = make_uint4(m.upper, above, m.lower, under);
  __syncwarp();
}

/* A lane's four neighbours of 128 columns, from the mask of 32, of which it has the bits from `shift` on, and the place in
   shared memory of the first value. */
__device__ __forceinline__ void expand_four(u32 mask, u32 at, int turn, u32 below, u32 through, u32 &low, u32 &high) {
  u32 how = *(const u32 *)(shared + (__funnelshift_r(mask, mask, turn) & 0x3C));
  u32 begin = at + 2 * __popc(mask & below), end = at + 2 * __popc(mask & through);
  low = pick(*(const u16 *)(shared + begin), *(const u16 *)(shared + begin + 2), how);
  high = pick(*(const u16 *)(shared + end - 4), *(const u16 *)(shared + end - 2), how >> 16);
}

/* sums (row of x) = S x^T for two rows of S. */
__device__ __forceinline__ void multiply_pair(const uint4 *records, const uint2 x[BATCH][STEPS], int turn, u32 below, u32 through,
                                              float sums[BATCH][4]) {
#pragma unroll
  for (int n = 0; n < BATCH; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[n][i] = 0;
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    uint4 r = records[4 * k];
    u32 a[4];
    expand_four(r.x, r.y, turn, below, through, a[0], a[2]);
    expand_four(r.z, r.w, turn, below, through, a[1], a[3]);
#pragma unroll
    for (int n = 0; n < BATCH; n++) multiply(sums[n], a[0], a[1], a[2], a[3], x[n][k].x, x[n][k].y);
  }
}

#ifdef RANK
/* The part of thread j of eight of a row of B times a row of u. */
__device__ __forceinline__ float multiply_factors(const Weight &w, int row, int n, int j) {
  const u16 *b = w.B + (long long)row * w.rank, *u = w.u + n * w.rank;
  float sum = 0;
#ifdef EIGHTS
  for (int q = 8 * j; q < w.rank; q += 64) {
    uint4 p = load16(b + q), v = *(const uint4 *)(u + q);
    u32 left[4] = {p.x, p.y, p.z, p.w}, right[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      sum += widen(left[i]) * widen(right[i]) + widen(left[i] >> 16) * widen(right[i] >> 16);
  }
#else
  for (int q = j; q < w.rank; q += 8) sum += widen(b[q]) * widen(u[q]);
#endif
  return sum;
}
#endif

extern "C" __global__ void __launch_bounds__(BATCH < 4 && THREADS < 640 ? 640 : THREADS, 1) vector(const __grid_constant__ Arguments args) {
  int number = 0, before = 0;
#pragma unroll
  for (int i = 1; i < WEIGHTS; i++)
    if (blockIdx.x >= args.weights[i - 1].last) number = i, before = (int)args.weights[i - 1].last;
  const Weight &w = args.weights[number];
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, slice = warp % SLICES, group = warp / SLICES;
  int blocks = (int)args.blocks, top = TOP * ((int)blockIdx.x - before), rows = min(TOP, (int)w.outs - top);
  float2 *results = (float2 *)(shared + TABLE + WARPS * OWN); /* (row of x, pair of rows, slice, piece) */
  /* The warp's pair i of rows: 2 (group + GROUPS i) and the next. */
  int pairs = (rows + 1) / 2, local = 2 * (group + GROUPS * (lane / 2)) + lane % 2;
  Places places = find_places(w, top + min(local, rows - 1), slice, blocks);
  bool tail = __any_sync(~0u, places.last > (u32)(w.nonzeros & ~7ll)), inside = lane < 4 * STEPS && 4 * STEPS * slice + lane < 2 * blocks;
  u32 mine = TABLE + warp * OWN, to = (u32)__cvta_generic_to_shared(shared) + mine + 16 * lane, nonzeros = (u32)w.nonzeros;
  const u16 *values = w.values;
#pragma unroll 1
  for (int ahead = 0; ahead < STAGES - 1; ahead++) bring(values, nonzeros, places, tail, ahead, to + ahead * STAGE, lane);
  long long begin = (long long)(top + 2 * group) * blocks + 2 * STEPS * slice, step = 2 * GROUPS * blocks;
  const u32 *words = w.words + 2 * begin + lane;
  const u16 *offsets = w.offsets + begin + lane / 2;
  auto masks_of = [&](int pair) { /* a row that is not there has the masks of the one before it */
    Masks m = read_masks(words, offsets, 2 * pair + 1 < rows ? blocks : 0, inside && pair < pairs);
    words += 2 * step, offsets += step;
    return m;
  };
  Masks later = masks_of(group);
#ifdef RANK
  if (threadIdx.x < rows) asm volatile("prefetch.global.L2 [%0];" ::"l"(w.B + (long long)(top + threadIdx.x) * w.rank));
#endif
  uint2 x[BATCH][STEPS];
#pragma unroll
  for (int n = 0; n < BATCH; n++)
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      int column = 128 * (STEPS * slice + i) + 4 * lane;
      x[n][i] = n < args.count && column < args.ins ? __ldg((const uint2 *)(args.x + n * args.ins + column)) : make_uint2(0, 0);
    }
  if (threadIdx.x < 16) ((u32 *)shared)[threadIdx.x] = selectors(threadIdx.x);
  __syncthreads();
  int turn = lane % 8 * 4 + 30 & 31, now = 0, next = STAGES - 1;
  u32 below = (1u << lane % 8 * 4) - 1, through = below << 4 | 15;
  const uint4 *records = (const uint4 *)(shared + mine + STAGES * STAGE) + lane / 8;
  float2 *result = results + (group * SLICES + slice) * 8 + lane / 4;
#pragma unroll 1
  for (int i = 0; group + GROUPS * i < pairs; i++) {
    wait_for_copies<STAGES - 2>();
    __syncwarp(); /* this stage has come, and all have read the one before it */
    if (group + GROUPS * (i + STAGES - 1) < pairs)
      bring(values, nonzeros, places, tail, i + STAGES - 1, to + next * STAGE, lane);
    else end_copies();
    u32 start = __shfl_sync(~0u, places.start, 2 * i), first = __shfl_sync(~0u, places.first, 2 * i);
    u32 other_start = __shfl_sync(~0u, places.start, 2 * i + 1), second = __shfl_sync(~0u, places.first, 2 * i + 1);
    u32 stage = mine + now * STAGE;
    Masks m = later;
#ifdef PER_BLOCK
    m.before_upper = m.before_lower = (2 * STEPS * slice + lane / 2) * PER_BLOCK;
#endif
    later = masks_of(group + GROUPS * (i + 1));
    record(m, mine + STAGES * STAGE, stage + 2 * (start - (first & ~7u)), stage + STRIDE + 2 * (other_start - (second & ~7u)),
           stage, inside, lane);
    float sums[BATCH][4];
    multiply_pair(records, x, turn, below, through, sums);
    if (lane % 4 == lane / 8) /* on the diagonal */
#pragma unroll
      for (int n = 0; n < BATCH; n++)
        result[n * (TOP / 2) * SLICES * 8] = lane & 4 ? make_float2(sums[n][1], sums[n][3]) : make_float2(sums[n][0], sums[n][2]);
    result += GROUPS * SLICES * 8;
    now = now + 1 == STAGES ? 0 : now + 1, next = next + 1 == STAGES ? 0 : next + 1;
  }
  /* Eight threads an entry of y, some entries each: first what does not wait for other warps. */
  float entries[(TOP * BATCH - 1) / (4 * WARPS) + 1] = {};
#ifdef RANK
  asm volatile("griddepcontrol.wait;" ::: "memory"); /* for u, by the launch before this one */
#pragma unroll
  for (int k = 0; 4 * WARPS * k < TOP * BATCH; k++) {
    int at = 4 * (WARPS * k + warp) + lane / 8;
    if (at % TOP < rows && at / TOP < args.count) entries[k] = multiply_factors(w, top + at % TOP, at / TOP, lane % 8);
  }
#endif
  __syncthreads();
#pragma unroll
  for (int k = 0; 4 * WARPS * k < TOP * BATCH; k++) {
    int at = 4 * (WARPS * k + warp) + lane / 8, row = at % TOP, n = at / TOP;
    bool there = row < rows && n < args.count;
    float sum = entries[k];
    if (there)
#pragma unroll
      for (int i = 0; i < SLICES; i++) {
        float2 pair = results[((n * (TOP / 2) + row / 2) * SLICES + i) * 8 + lane % 8];
        sum += row % 2 ? pair.y : pair.x;
      }
#pragma unroll
    for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (!there || lane % 8) continue;
#ifdef BIAS
    sum += widen(w.bias[top + row]);
#endif
    w.y[(long long)n * w.outs + top + row] = narrow(sum);
  }
}
