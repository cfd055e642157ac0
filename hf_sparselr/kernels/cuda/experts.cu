/* y = x S^T + (x A^T) B^T + bias, where each row of x has the weight of its own expert (compiled behind small_batch.cu).
 *
 * Rows come in the order of their experts. Only the device knows how many rows an expert has: a block finds its expert in
 * `ends`, and ends at once where there is nothing to do.
 *
 * `experts` takes few rows an expert, as `small_batch` does. `experts_pairs` takes many, for 2:4: the values of S and the
 * rows of x pass through shared memory, and S goes to the sparse tensor cores as it is.
 *
 * Compiled for: what small_batch.cu is, BY_ROW (a block for each row, of which the first of each batch works; else a
 * block for each expert), and for `experts_pairs` MANY with SAMPLES rows of x of a block, PARTS tiles of 16 rows of S of
 * a warp, ACROSS warps beside each other along the rows of x, DEEP stages of loads.
 */
struct Experts {
  const u16 *x;
  float *u; /* x A^T */
  u16 *y;
  const Weight *weights; /* of each expert */
  const int *ends;       /* for each expert, the first row after its own */
  long long experts, ins, blocks, widest; /* widest: entries of u for a row */
};

struct Span {
  int expert, first, start, end; /* its first row; the rows that the block works on */
};

/* The expert whose rows hold a row, or the number of experts. */
__device__ __forceinline__ int expert_of(const Experts &args, int row) {
  int expert = 0;
  for (int at = threadIdx.x; at - (int)threadIdx.x < args.experts; at += THREADS)
    expert += __syncthreads_count(at < args.experts && args.ends[at] <= row);
  return expert;
}

__device__ __forceinline__ Span span_of(const Experts &args) {
#ifdef BY_ROW
  int row = blockIdx.y, expert = expert_of(args, row);
  if (expert >= args.experts) return {0, 0, 0, 0};
  int first = expert ? args.ends[expert - 1] : 0;
  return {expert, first, row, (row - first) % BATCH ? row : min(args.ends[expert], row + BATCH)};
#else
  int expert = blockIdx.y, first = expert ? args.ends[expert - 1] : 0;
  return {expert, first, first, args.ends[expert]};
#endif
}

/* sums += rows of a dense matrix times rows of x: the columns as in `accumulate`. */
__device__ __forceinline__ void accumulate_dense(const u16 *matrix, int outs, const u16 *x, int count, int ins, int top,
                                                 int warp, int lane, float sums[ROWS / 16][TILES][4]) {
  int g = lane / 4, t = lane % 4;
#pragma unroll 4
  for (int column = 32 * warp + 8 * t; column - 8 * t < ins; column += 32 * WARPS) {
    uint4 zero = make_uint4(0, 0, 0, 0), a[ROWS / 8];
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++)
      a[i] = column < ins ? load16(matrix + (long long)min(top + 8 * i + g, outs - 1) * ins + column) : zero;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      uint4 b = column < ins ? load16(x + (long long)min(8 * n + g, count - 1) * ins + column) : zero;
#pragma unroll
      for (int i = 0; i < ROWS / 16; i++) {
        multiply(sums[i][n], a[2 * i].x, a[2 * i + 1].x, a[2 * i].y, a[2 * i + 1].y, b.x, b.y);
        multiply(sums[i][n], a[2 * i].z, a[2 * i + 1].z, a[2 * i].w, a[2 * i + 1].w, b.z, b.w);
      }
    }
  }
}

/* Lays the sums of all warps into shared memory: (warps, batch, rows). */
__device__ __forceinline__ void lay_out(float sums[ROWS / 16][TILES][4], int warp, int lane) {
  float *parts = (float *)shared;
  __syncthreads();
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
}

__device__ __forceinline__ float total(int at) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) sum += ((float *)shared)[i * BATCH * ROWS + at];
  return sum;
}

#ifdef RANK
/* u = x A^T. */
extern "C" __global__ void __launch_bounds__(THREADS) experts_low_rank(const __grid_constant__ Experts args) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  Span span = span_of(args);
  int top = ROWS * blockIdx.x;
  if (span.start >= span.end) return;
  const Weight &w = args.weights[span.expert];
  int rank = (int)w.rank, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (top >= rank) return;
  for (int start = span.start; start < span.end; start += BATCH) {
    int count = min(BATCH, span.end - start);
    float sums[ROWS / 16][TILES][4] = {};
    accumulate_dense(w.A, rank, args.x + start * args.ins, count, (int)args.ins, top, warp, lane, sums);
    lay_out(sums, warp, lane);
    long long base = span.first * args.widest + (start - span.first) * (long long)rank;
    for (int at = threadIdx.x; at < BATCH * ROWS; at += THREADS) {
      int row = at % ROWS, sample = at / ROWS;
      if (top + row >= rank || sample >= count) continue;
      args.u[base + sample * rank + top + row] = total(at);
    }
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) experts(const __grid_constant__ Experts args) {
  Span span = span_of(args);
  if (span.start >= span.end) return;
  Weight w = args.weights[span.expert];
  int top = ROWS * blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Arguments part;
  part.ins = args.ins, part.blocks = args.blocks, w.at = 0;
  for (int start = span.start; start < span.end; start += BATCH) {
    part.x = args.x + start * args.ins;
    part.count = min(BATCH, span.end - start);
#ifndef PAIRS
    __syncthreads();
    if (threadIdx.x < 16) ((u32 *)shared)[threadIdx.x] = selectors(threadIdx.x);
    __syncthreads();
#endif
    float sums[ROWS / 16][TILES][4] = {};
#ifdef FOURS
    uint2 factors[ROWS / 8];
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) factors[i] = read_factors(w, top + 8 * i + lane / 4, 16 * warp + 4 * (lane % 4));
#endif
    accumulate(w, part, top, warp, lane, sums);
#ifdef RANK
    part.u = args.u + span.first * args.widest + (start - span.first) * w.rank;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory"); /* for u */
#endif
#endif
#ifdef FOURS
    for (int q = 16 * warp; q < w.rank; q += 16 * WARPS) {
      if (q != 16 * warp)
#pragma unroll
        for (int i = 0; i < ROWS / 8; i++) factors[i] = read_factors(w, top + 8 * i + lane / 4, q + 4 * (lane % 4));
      add_low_rank(w, part, q + 4 * (lane % 4), lane / 4, factors, sums);
    }
#endif
    lay_out(sums, warp, lane);
    u16 *y = args.y + start * w.outs;
    for (int at = threadIdx.x; at < BATCH * ROWS; at += THREADS) {
      int row = at % ROWS, sample = at / ROWS;
      if (top + row >= w.outs || sample >= part.count) continue;
      float sum = total(at);
#if defined(RANK) && !defined(FOURS)
      for (int q = 0; q < w.rank; q++) sum += widen(w.B[(top + row) * w.rank + q]) * part.u[sample * w.rank + q];
#endif
#ifdef BIAS
      sum += widen(w.bias[top + row]);
#endif
      y[sample * w.outs + top + row] = narrow(sum);
    }
  }
}

#ifdef MANY
#define KEPT 80          /* bytes of shared memory for 64 columns of a row of S: values, the mask, and a gap */
#define TAKEN 144        /* bytes for 64 columns of a row of x, and a gap */
#define DOWN (WARPS / ACROSS) /* warps beside each other along the rows of S; ACROSS of them along the rows of x */
#define HEIGHT (16 * PARTS * DOWN) /* rows of S of a block */
#define NEAR (SAMPLES / 8 / ACROSS) /* tiles of 8 rows of x of a warp */
#define STAGE (HEIGHT * KEPT + SAMPLES * TAKEN)
#define PITCH (HEIGHT + 8) /* entries of a row of y in shared memory */

__device__ __forceinline__ void copy16(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void copy8(u32 to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ uint4 load_matrices(u32 at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}

/* The rows of one tile of SAMPLES rows of x: tiles are counted over all experts. */
__device__ __forceinline__ Span tile_of(const Experts &args, int tile) {
  __shared__ int before[WARPS + 1], found[2];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, passed = 0;
  if (threadIdx.x == 0) found[0] = -1;
  for (int at = threadIdx.x; at - (int)threadIdx.x < args.experts; at += THREADS) {
    int rows = at < args.experts ? args.ends[at] - (at ? args.ends[at - 1] : 0) : 0;
    int tiles = (rows + SAMPLES - 1) / SAMPLES, sum = tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == 31) before[warp] = sum;
    __syncthreads();
    int all = 0, earlier = 0;
    for (int i = 0; i < WARPS; i++) {
      if (i < warp) earlier += before[i];
      all += before[i];
    }
    int end = passed + earlier + sum;
    if (tile < end && tile >= end - tiles) found[0] = at, found[1] = tile - (end - tiles);
    passed += all;
  }
  __syncthreads();
  int expert = found[0];
  if (expert < 0) return {0, 0, 0, 0};
  int first = expert ? args.ends[expert - 1] : 0, start = first + SAMPLES * found[1];
  return {expert, first, start, min(args.ends[expert], start + SAMPLES)};
}

/* Many rows of x at 2:4. A block owns HEIGHT rows of S and up to SAMPLES rows of x; a warp 16 PARTS rows of S. Of u, in
   16 bits, each row has `widest` entries. */
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) experts_pairs(const __grid_constant__ Experts args) {
  Span span = tile_of(args, blockIdx.x);
  if (span.start >= span.end) return;
  const Weight &w = args.weights[span.expert];
  int outs = (int)w.outs, top = HEIGHT * blockIdx.y, count = span.end - span.start, steps = (int)args.blocks;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int across = warp % ACROSS, down = warp / ACROSS * 16 * PARTS; /* the warp's first row of S in the block */
  u32 base = (u32)__cvta_generic_to_shared(shared);
  const u16 *x = args.x + span.start * args.ins;
  long long width = args.ins / 2;

  auto fetch = [&](int step) {
    u32 to = base + step % DEEP * STAGE;
    if (step < steps) {
#pragma unroll
      for (int i = threadIdx.x; i < HEIGHT * 4; i += THREADS) {
        long long row = min(top + i / 4, outs - 1);
        copy16(to + i / 4 * KEPT + i % 4 * 16, w.values + row * width + 32 * step + i % 4 * 8);
      }
#pragma unroll
      for (int i = threadIdx.x; i < HEIGHT; i += THREADS)
        copy8(to + i * KEPT + 64, w.words + (long long)min(top + i, outs - 1) * args.blocks + step);
#pragma unroll
      for (int i = threadIdx.x; i < SAMPLES * 8; i += THREADS) {
        long long row = min(i / 8, count - 1);
        copy16(to + HEIGHT * KEPT + i / 8 * TAKEN + i % 8 * 16, x + row * args.ins + 64 * step + i % 8 * 8);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  for (int step = 0; step < DEEP - 1; step++) fetch(step);
  float sums[PARTS][NEAR][4] = {};
  for (int step = 0; step < steps; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(DEEP - 2));
    __syncthreads(); /* all see the values of this step, and have read those of the last one */
    fetch(step + DEEP - 1);
    u32 here = base + step % DEEP * STAGE;
    u32 kept[2 * PARTS][4], code[PARTS];
#pragma unroll
    for (int i = 0; i < 2 * PARTS; i++) {
      u32 row = here + (down + 8 * i + g) * KEPT, bits;
#pragma unroll
      for (int j = 0; j < 4; j++)
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(kept[i][j]) : "r"(row + 4 * (t + 4 * j)));
      asm volatile("{ .reg .b16 h; ld.shared.b16 h, [%1]; cvt.u32.u16 %0, h; }" : "=r"(bits) : "r"(row + 64 + 2 * t));
      code[i / 2] = i % 2 ? metadata(code[i / 2] | bits << 16) : bits;
    }
    here += HEIGHT * KEPT + (8 * NEAR * across + lane % 8) * TAKEN + lane / 8 * 16;
#pragma unroll
    for (int n = 0; n < NEAR; n++) {
      if (8 * (NEAR * across + n) >= count) continue;
      uint4 b = load_matrices(here + 8 * n * TAKEN), c = load_matrices(here + 8 * n * TAKEN + 64);
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        u32 *p = kept[2 * i], *q = kept[2 * i + 1];
        multiply_sparse<0>(sums[i][n], p[0], q[0], p[1], q[1], b.x, b.y, b.z, b.w, code[i]);
      }
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        u32 *p = kept[2 * i], *q = kept[2 * i + 1];
        multiply_sparse<1>(sums[i][n], p[2], q[2], p[3], q[3], c.x, c.y, c.z, c.w, code[i]);
      }
    }
  }
  asm volatile("cp.async.wait_group 0;");
#ifdef RANK
  const u16 *u = (const u16 *)args.u + span.start * args.widest;
  for (int q = 4 * t; q - 4 * t < w.rank; q += 16) {
    uint2 factors[2 * PARTS], zero = make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < 2 * PARTS; i++) {
      int row = top + down + 8 * i + g;
      factors[i] = row < outs && q < w.rank ? __ldg((const uint2 *)(w.B + row * w.rank + q)) : zero;
    }
#pragma unroll
    for (int n = 0; n < NEAR; n++) {
      int sample = 8 * (NEAR * across + n) + g;
      uint2 b = sample < count && q < w.rank ? __ldg((const uint2 *)(u + sample * args.widest + q)) : zero;
#pragma unroll
      for (int i = 0; i < PARTS; i++)
        multiply(sums[i][n], factors[2 * i].x, factors[2 * i + 1].x, factors[2 * i].y, factors[2 * i + 1].y, b.x, b.y);
    }
  }
#endif
  __syncthreads(); /* the stages are no longer read: y takes their place, so that rows of it are written as a whole */
  u16 *tile = (u16 *)shared;
#pragma unroll
  for (int i = 0; i < PARTS; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int row = down + 16 * i + g + 8 * (j / 2);
      float bias = 0;
#ifdef BIAS
      if (top + row < outs) bias = widen(w.bias[top + row]);
#endif
#pragma unroll
      for (int n = 0; n < NEAR; n++)
        tile[(8 * (NEAR * across + n) + 2 * t + j % 2) * PITCH + row] = narrow(sums[i][n][j] + bias);
    }
  __syncthreads();
  u16 *y = args.y + span.start * (long long)outs + top;
  for (int i = threadIdx.x; i < count * (HEIGHT / 8); i += THREADS) {
    int sample = i / (HEIGHT / 8), row = i % (HEIGHT / 8) * 8;
    const u16 *from = tile + sample * PITCH + row;
    u16 *to = y + sample * (long long)outs + row;
    if (outs % 8 == 0 && top + row < outs) *(uint4 *)to = *(const uint4 *)from;
    else
      for (int j = 0; j < 8 && top + row + j < outs; j++) to[j] = from[j];
  }
}
#endif
