/* y = x S^T + u B^T + bias for more rows of x than `small_batch` takes, S packed at 2:4, on the sparse tensor cores.
 *
 * A warp owns ROWS rows of S, whose values and mask it reads straight into registers, once for BATCH rows of x. These pass
 * through shared memory, a step of 64 columns at a time, for all warps of a block. There they lie as the product reads
 * them: a unit of four columns, 8 bytes, at the place where ldmatrix hands it to the lanes that have its group of S.
 *
 * Compiled for: ROWS of S of a warp (16 or 32), WARPS of a block, TILES of 8 rows of x, RESIDENT blocks of a
 * multiprocessor that registers are left for, PARTS (sums of a part of the columns, FP32), RANK (factors or not), BIAS, HALF.
 */
#include "tensor_cores.cuh"

struct Arguments {
  const u16 *x;
  const u64 *words; /* the mask, 64 columns each */
  const u16 *values, *B, *u, *bias;
  void *y; /* FP32 for PARTS */
  long long count, ins, outs, rank, span; /* rows of x, columns, rows of S; span: steps of a part */
};

#define THREADS (32 * WARPS)
#define BATCH (8 * TILES)
#define STAGES 3
#define STAGE (BATCH * 128) /* bytes */

/* x of a step, 64 columns, to shared memory. Unit 4 a + b of a row goes to half a % 2 of its chunk 2 b + a / 2 of 16
   bytes; chunks lie in another order in every row, so that eight rows are read without conflicts. */
__device__ __forceinline__ void bring(const Arguments &args, u32 to, int step, int left, const u16 *x) {
  int unit = threadIdx.x % 16, row = threadIdx.x / 16, a = unit / 4, b = unit % 4;
  u32 place = to + row * 128 + ((2 * b + a / 2) ^ (row % 8)) * 16 + a % 2 * 8;
  const u16 *from = x + row * args.ins + 64 * step + 4 * unit;
#pragma unroll
  for (int i = 0; i < BATCH * 16 / THREADS; i++) {
    int more = THREADS / 16 * i; /* rows, a multiple of 8 */
    int bytes = row + more < left ? 8 : 0;
    const u16 *source = bytes ? from + more * args.ins : args.x;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(place + more * 128), "l"(source), "r"(bytes));
  }
}

__device__ __forceinline__ uint4 load_matrices(u32 at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) medium_batch(const __grid_constant__ Arguments args) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int top = (blockIdx.x * WARPS + warp) * ROWS, first = blockIdx.z * BATCH, left = (int)args.count - first;
  int blocks = (int)(args.ins / 64), begin = blockIdx.y * (int)args.span, end = min(begin + (int)args.span, blocks);
  const u64 *words[ROWS / 8];
  const u16 *values[ROWS / 8], *x = args.x + first * args.ins;
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) {
    long long row = min(top + 8 * i + g, (int)args.outs - 1);
    words[i] = args.words + row * blocks;
    values[i] = args.values + row * (args.ins / 2) + 8 * t;
  }
  u32 memory = (u32)__cvta_generic_to_shared(shared);
  u32 reads = memory + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (begin + s < end) bring(args, memory + s * STAGE, begin + s, left, x);
    asm volatile("cp.async.commit_group;");
  }
  uint4 ahead[ROWS / 8];
  u64 masks[ROWS / 8];
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) {
    ahead[i] = stream16(values[i] + 32 * begin);
    masks[i] = __ldg(words[i] + begin);
  }
  float sums[ROWS / 16][TILES][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = begin; step < end; step++) {
    uint4 kept[ROWS / 8];
    u32 code[ROWS / 16];
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) kept[i] = ahead[i];
#pragma unroll
    for (int i = 0; i < ROWS / 16; i++) {
      u64 upper = masks[2 * i], lower = masks[2 * i + 1];
      code[i] = metadata(places((u32)upper, upper >> 32, t) | places((u32)lower, lower >> 32, t) << 16);
    }
    int next = min(step + 1, blocks - 1);
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) {
      ahead[i] = stream16(values[i] + 32 * next);
      masks[i] = __ldg(words[i] + next);
    }
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads(); /* this step has come, and all have read the one before */
    int free = stage == 0 ? STAGES - 1 : stage - 1;
    if (step + STAGES - 1 < end) bring(args, memory + free * STAGE, step + STAGES - 1, left, x);
    asm volatile("cp.async.commit_group;");
    u32 at = reads + stage * STAGE;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      uint4 near = load_matrices(at + n * 1024), far = load_matrices((at + n * 1024) ^ 64);
#pragma unroll
      for (int i = 0; i < ROWS / 16; i++) {
        uint4 p = kept[2 * i], q = kept[2 * i + 1];
        multiply_sparse<0>(sums[i][n], p.x, q.x, p.y, q.y, near.x, near.y, near.z, near.w, code[i]);
        multiply_sparse<1>(sums[i][n], p.z, q.z, p.w, q.w, far.x, far.y, far.z, far.w, code[i]);
      }
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
#ifdef RANK
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory"); /* for u, by the launch before this one */
#endif
  if (blockIdx.y == 0)
    for (int q = 4 * t; q - 4 * t < args.rank; q += 16) { /* four factors of each thread */
      uint2 factors[ROWS / 8];
#pragma unroll
      for (int i = 0; i < ROWS / 8; i++) {
        long long row = min(top + 8 * i + g, (int)args.outs - 1);
        factors[i] = q < args.rank ? __ldg((const uint2 *)(args.B + row * args.rank + q)) : make_uint2(0, 0);
      }
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        long long sample = first + min(8 * n + g, left - 1);
        uint2 v = q < args.rank ? *(const uint2 *)(args.u + sample * args.rank + q) : make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < ROWS / 16; i++)
          multiply(sums[i][n], factors[2 * i].x, factors[2 * i + 1].x, factors[2 * i].y, factors[2 * i + 1].y, v.x, v.y);
      }
    }
#endif
#pragma unroll
  for (int i = 0; i < ROWS / 16; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = top + 16 * i + g + 8 * half;
      if (row >= args.outs) continue;
      float more = 0;
#ifdef BIAS
      if (blockIdx.y == 0) more = widen(args.bias[row]);
#endif
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          int sample = 8 * n + 2 * t + j;
          if (sample >= left) continue;
          float sum = sums[i][n][2 * half + j] + more;
#ifdef PARTS
          ((float *)args.y)[((long long)blockIdx.y * args.count + first + sample) * args.outs + row] = sum;
#else
          ((u16 *)args.y)[(long long)(first + sample) * args.outs + row] = narrow(sum);
#endif
        }
    }
}
