/* u = x A^T for small ranks of weights that share x, on the tensor cores: a block has FACTORS factors of one weight and
 * BATCH rows of x. The blocks of a cluster share the columns, their warps take turns along them, and a thread owns 8
 * neighbouring columns of each row. Sums are added up in one order.
 *
 * Compiled for: WARPS of a block, TILES of 8 rows of x, GROUPS of 16 factors, CLUSTER blocks that share the columns (1
 * before compute capability 9.0), HALF.
 */
#include "tensor_cores.cuh"

#define THREADS (32 * WARPS)
#define BATCH (8 * TILES)
#define FACTORS (16 * GROUPS)
#define AT_ONCE (GROUPS > 2 ? 1 : 2) /* steps of 32 columns whose loads are issued together */
#define WEIGHTS 4                    /* at most */

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

#if CLUSTER > 1
#define SHARING __cluster_dims__(1, 1, CLUSTER)

__device__ __forceinline__ void meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* What another block of the cluster has where this one has `mine`. */
__device__ __forceinline__ float of_block(const float *mine, int block) {
  u32 at = (u32)__cvta_generic_to_shared(mine), there;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
}
#else
#define SHARING
#endif

extern "C" __global__ void SHARING __launch_bounds__(THREADS) low_rank(const __grid_constant__ Arguments args) {
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
  int top = FACTORS * ((int)blockIdx.x - before), first = BATCH * blockIdx.y;
  const u16 *factors[GROUPS][2], *rows[TILES];
#pragma unroll
  for (int i = 0; i < 2 * GROUPS; i++) factors[i / 2][i % 2] = weight.A + min(top + 8 * i + g, (int)rank - 1) * ins;
#pragma unroll
  for (int n = 0; n < TILES; n++) rows[n] = args.x + min((long long)(first + 8 * n + g), count - 1) * ins;
  float sums[GROUPS][TILES][4] = {};
  int turn = 32 * AT_ONCE;
  for (int start = turn * (warp + WARPS * blockIdx.z); start < ins; start += turn * WARPS * CLUSTER) {
    uint4 a[AT_ONCE][GROUPS][2], v[AT_ONCE][TILES], none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int s = 0; s < AT_ONCE; s++) {
      int column = start + 32 * s + 8 * t;
      bool inside = column < ins;
#pragma unroll
      for (int i = 0; i < 2 * GROUPS; i++) a[s][i / 2][i % 2] = inside ? load16(factors[i / 2][i % 2] + column) : none;
#pragma unroll
      for (int n = 0; n < TILES; n++) v[s][n] = inside ? load16(rows[n] + column) : none;
    }
#pragma unroll
    for (int s = 0; s < AT_ONCE; s++)
#pragma unroll
      for (int i = 0; i < GROUPS; i++)
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          uint4 p = a[s][i][0], q = a[s][i][1];
          multiply(sums[i][n], p.x, q.x, p.y, q.y, v[s][n].x, v[s][n].y);
          multiply(sums[i][n], p.z, q.z, p.w, q.w, v[s][n].z, v[s][n].w);
        }
  }
  __shared__ float parts[WARPS][BATCH][17], totals[GROUPS * BATCH * 16];
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) parts[warp][8 * n + 2 * t + j % 2][g + 8 * (j / 2)] = sums[i][n][j];
    __syncthreads();
    for (int at = threadIdx.x; at < BATCH * 16; at += THREADS) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += parts[w][at / 16][at % 16];
      totals[i * BATCH * 16 + at] = sum;
    }
    __syncthreads();
  }
#if CLUSTER > 1
  meet();
#endif
  for (int at = threadIdx.x + THREADS * blockIdx.z; at < GROUPS * BATCH * 16; at += THREADS * CLUSTER) {
    int factor = top + at / (16 * BATCH) * 16 + at % 16, sample = first + at / 16 % BATCH;
    float sum = totals[at];
#if CLUSTER > 1
    sum = 0;
    for (int block = 0; block < CLUSTER; block++) sum += of_block(totals + at, block);
#endif
    if (factor < rank && sample < count) weight.u[sample * rank + factor] = narrow(sum);
  }
#if CLUSTER > 1
  meet(); /* shared memory stays while others read it */
#endif
}
