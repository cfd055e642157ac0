/* Barriers, copies of tiles and asynchronous products of compute capability 9.0. */
#include "tensor_cores.cuh"

struct __align__(64) Map { /* CUtensorMap */
  u64 words[16];
};

__device__ __forceinline__ void start_barrier(u32 at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_for(u32 barrier, int parity) {
  u32 done;
  do
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  while (!done);
}

/* The address of a place of this block's shared memory in that of another block of the cluster. */
__device__ __forceinline__ u32 in_block(u32 at, int block) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
  return there;
}

__device__ __forceinline__ void arrive_at(u32 barrier_of_cluster) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_of_cluster) : "memory");
}

__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* The same where no memory is passed on. */
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void ask_for(const Map &map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

__device__ __forceinline__ void copy_tile(u32 to, const Map &map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

/* To the same place of all blocks of the cluster in `blocks`, one bit each. */
__device__ __forceinline__ void copy_tile_to(u32 to, const Map &map, int column, int row, u32 barrier, int blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
               "[%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"((u16)blocks)
               : "memory");
}

/* Of a tile in shared memory whose rows are SWIZZLE bytes (64 or 128), eight of them a unit. */
template <int SWIZZLE> __device__ __forceinline__ u64 tile_at(u32 at) {
  return (u64)(at >> 4) | 1ull << 16 | (u64)(8 * SWIZZLE / 16) << 32 | (SWIZZLE == 128 ? 1ull : 2ull) << 62;
}

__device__ __forceinline__ void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void finish_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#ifdef HALF
#define WIDE_KIND "f32.f16.f16"
#else
#define WIDE_KIND "f32.bf16.bf16"
#endif

/* The N / 2 sums of a thread as operands. */
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F8(i) F4(i), F4(i + 4)
#define F16(i) F8(i), F8(i + 8)
#define F32(i) F16(i), F16(i + 16)
#define F64(i) F32(i), F32(i + 32)
#define L4 "%0, %1, %2, %3"
#define L8 L4 ", %4, %5, %6, %7"
#define L16 L8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define L32 L16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define L64                                                                                                          \
  L32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define L128                                                                                                         \
  L64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "  \
      "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "    \
      "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
      "%123, %124, %125, %126, %127"
#if N == 8
#define WIDTH "8"
#define SUMS "{" L4 "}, %4, %5, "
#define OPERANDS F4(0)
#define THIRD "%6"
#define FOURTH "%7"
#define FIFTH "%8"
#elif N == 16
#define WIDTH "16"
#define SUMS "{" L8 "}, %8, %9, "
#define OPERANDS F8(0)
#define THIRD "%10"
#define FOURTH "%11"
#define FIFTH "%12"
#elif N == 32
#define WIDTH "32"
#define SUMS "{" L16 "}, %16, %17, "
#define OPERANDS F16(0)
#define THIRD "%18"
#define FOURTH "%19"
#define FIFTH "%20"
#elif N == 64
#define WIDTH "64"
#define SUMS "{" L32 "}, %32, %33, "
#define OPERANDS F32(0)
#define THIRD "%34"
#define FOURTH "%35"
#define FIFTH "%36"
#elif N == 128
#define WIDTH "128"
#define SUMS "{" L64 "}, %64, %65, "
#define OPERANDS F64(0)
#define THIRD "%66"
#define FOURTH "%67"
#define FIFTH "%68"
#elif N == 256
#define WIDTH "256"
#define SUMS "{" L128 "}, %128, %129, "
#define OPERANDS F64(0), F64(64)
#define THIRD "%130"
#define FOURTH "%131"
#define FIFTH "%132"
#endif

/* sums (64 rows of a, N rows of b) += a b^T for 32 columns: of a, the kept half of them in shared memory and `code`, which
   two of four threads hold (SELECTOR); b whole. */
template <int SELECTOR> __device__ __forceinline__ void multiply_pairs(float *d, u64 a, u64 b, u32 code) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " FOURTH ", 0; wgmma.mma_async.sp.sync.aligned.m64n" WIDTH "k32." WIDE_KIND
               " " SUMS THIRD ", " FIFTH ", p, 1, 1, 0, 0; }" : OPERANDS : "l"(a), "l"(b), "r"(code), "r"(1), "n"(SELECTOR));
}

/* The same for 16 columns, all of them there. */
__device__ __forceinline__ void multiply_wide(float *d, u64 a, u64 b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " THIRD ", 0; wgmma.mma_async.sync.aligned.m64n" WIDTH "k16." WIDE_KIND " " SUMS
               "p, 1, 1, 0, 0; }" : OPERANDS : "l"(a), "l"(b), "r"(1));
}

/* After the last product: what is read of the sums comes after it. */
__device__ __forceinline__ void settle(float *d) {
  finish_products<0>();
#pragma unroll
  for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(d[i])::"memory");
}
