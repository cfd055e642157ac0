/* u = x A^T for small ranks of weights that share x, on the tensor cores: a block has 16 factors of one weight and BATCH
 * rows of x, its warps take turns along the columns. A thread owns 8 neighbouring columns of each row.
 *
 * Compiled for: WARPS of a block, TILES of 8 rows of x, HALF.
 */
#include "tensor_cores.cuh"

#define THREADS (32 * WARPS)
#define BATCH (8 * TILES)
#define AT_ONCE 2 /* steps of 32 columns whose loads are issued together */
#define WEIGHTS 4 /* at most */

struct Weight {
  const u16 *A;
  u16 *u;
  long long rank, last; /* the first block after its own */
};

struct Arguments {
  const u16 *x;
  long long count, ins;
  Weight weights[WEIGHTS];
};

extern "C" __global__ void __launch_bounds__(THREADS) low_rank(const __grid_constant__ Arguments args) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;"); /* the product with S may start beside this */
#endif
  int number = 0, before = 0;
#pragma unroll
  for (int i = 1; i < WEIGHTS; i++)
    if (blockIdx.x >= args.weights[i - 1].last) number = i, before = (int)args.weights[i - 1].last;
  const Weight &weight = args.weights[number];
  long long ins = args.ins, rank = weight.rank, count = args.count;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int top = 16 * ((int)blockIdx.x - before), first = BATCH * blockIdx.y;
  const u16 *upper = weight.A + min(top + g, (int)rank - 1) * ins, *lower = weight.A + min(top + g + 8, (int)rank - 1) * ins;
  const u16 *rows[TILES];
#pragma unroll
  for (int n = 0; n < TILES; n++) rows[n] = args.x + min((long long)(first + 8 * n + g), count - 1) * ins;
  float sums[TILES][4] = {};
  for (int start = 32 * AT_ONCE * warp; start < ins; start += 32 * AT_ONCE * WARPS) {
    uint4 p[AT_ONCE], q[AT_ONCE], v[AT_ONCE][TILES];
#pragma unroll
    for (int s = 0; s < AT_ONCE; s++) {
      int column = start + 32 * s + 8 * t;
      bool inside = column < ins;
      p[s] = inside ? load16(upper + column) : make_uint4(0, 0, 0, 0);
      q[s] = inside ? load16(lower + column) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int n = 0; n < TILES; n++) v[s][n] = inside ? load16(rows[n] + column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int s = 0; s < AT_ONCE; s++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        multiply(sums[n], p[s].x, q[s].x, p[s].y, q[s].y, v[s][n].x, v[s][n].y);
        multiply(sums[n], p[s].z, q[s].z, p[s].w, q[s].w, v[s][n].z, v[s][n].w);
      }
  }
  __shared__ float parts[WARPS][BATCH][17];
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int j = 0; j < 4; j++) parts[warp][8 * n + 2 * t + j % 2][g + 8 * (j / 2)] = sums[n][j];
  __syncthreads();
  for (int at = threadIdx.x; at < BATCH * 16; at += THREADS) {
    int factor = at % 16, sample = at / 16;
    if (top + factor >= rank || first + sample >= count) continue;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += parts[i][sample][factor];
    weight.u[(first + sample) * rank + top + factor] = narrow(sum);
  }
}
