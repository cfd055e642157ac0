/* What the kernels for the tensor cores have in common. HALF: FP16 in the place of BF16. */
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float widen(u16 value) {
#ifdef HALF
  float wide;
  asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(wide) : "h"(value));
  return wide;
#else
  return __uint_as_float((u32)value << 16);
#endif
}

__device__ __forceinline__ u16 narrow(float value) {
  u16 bits;
#ifdef HALF
  asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; mov.b16 %0, h; }" : "=h"(bits) : "f"(value));
#else
  asm("{ .reg .b16 h; cvt.rn.bf16.f32 h, %1; mov.b16 %0, h; }" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

#ifdef HALF
#define KIND "f32.f16.f16.f32"
#else
#define KIND "f32.bf16.bf16.f32"
#endif

__device__ __forceinline__ void multiply(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col." KIND " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#define SPARSE(SELECTOR)                                                                                        \
  asm("mma.sp" ORDERED ".sync.aligned.m16n8k32.row.col." KIND " {%0, %1, %2, %3}, {%4, %5, %6, %7}, "           \
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " #SELECTOR ";"                                              \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                          \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(b2), "r"(b3), "r"(e))
#if __CUDACC_VER_MAJOR__ * 10 + __CUDACC_VER_MINOR__ >= 125
#define ORDERED "::ordered_metadata"
#else
#define ORDERED
#endif

template <int SELECTOR>
__device__ __forceinline__ void multiply_sparse(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, u32 b2,
                                                u32 b3, u32 e) {
  if (SELECTOR) SPARSE(1);
  else SPARSE(0);
}

/* Bytes of two words; `how` is not cleaned, as __byte_perm does it. */
__device__ __forceinline__ u32 pick(u32 low, u32 high, u32 how) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(how));
  return bytes;
}

__device__ __forceinline__ uint4 load16(const void *at) { return __ldg((const uint4 *)at); }

__device__ __forceinline__ uint4 stream16(const void *at) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

/* 16 bytes to shared memory, in the background: copies up to the next `end_copies` are waited for together. */
__device__ __forceinline__ void copy_if(u32 to, const void *from, bool wanted) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(to), "l"(from),
               "r"((int)wanted) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LATER> __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

extern __shared__ __align__(16) unsigned char shared[];

/* Bits 0..3 of each byte of a word of `mask >> 4 t`, for 16 groups of four columns: the places of the two kept columns
   of groups t, t + 4, t + 8, t + 12, four bits each. */
__device__ __forceinline__ u32 places(u32 low, u32 high, int t) {
  u32 four = (__byte_perm(low >> 4 * t, high >> 4 * t, 0x6420)) & 0x0F0F0F0F;
  four = (four | four >> 4) & 0x00FF00FF;
  return (four | four >> 8) & 0xFFFF;
}

/* For each nibble of a mask that keeps two of four columns: the first of them in bits 0, 1, the second in bits 2, 3. Five
   instructions: bits 1 and 3 are b0 nor b1, b2 or b3; bits 0 and 2 are b1 and not b0, b3 or not b2. */
__device__ __forceinline__ u32 metadata(u32 mask) {
  u32 above = mask << 1, below = mask >> 1;
  u32 odd = (mask | above) ^ 0x22222222, even = (below & ~mask) | (0x44444444 & (below | ~mask));
  return (odd & 0xAAAAAAAA) | (even & 0x55555555);
}

/* For each nibble of a mask: which bytes of the first two of its values make its first two columns, and which of its
   last two the others. A value lies in bytes 0, 1 of a register; bytes 2 of the first are zero. */
__device__ __forceinline__ u32 selectors(int nibble) {
  int b0 = nibble & 1, b1 = nibble >> 1 & 1, b2 = nibble >> 2 & 1, b3 = nibble >> 3 & 1;
  u32 c0 = b0 ? 0x10 : 0x22, c1 = b1 ? (b0 ? 0x54 : 0x10) : 0x22;
  u32 c2 = b2 ? (b3 ? 0x10 : 0x54) : 0x22, c3 = b3 ? 0x54 : 0x22;
  return c0 | c1 << 8 | c2 << 16 | c3 << 24;
}

__device__ __forceinline__ u32 load_value(u32 at) {
  u32 value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(at));
  return value;
}

__device__ __forceinline__ u32 load_word(u32 at) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at));
  return value;
}

/* Eight columns as four registers, from their byte of the mask and the address of their first value. */
__device__ __forceinline__ void expand(u32 byte, u32 at, u32 table, u32 *out) {
  u32 low = load_word(table + 4 * (byte & 15)), high = load_word(table + (byte >> 4) * 4);
  u32 middle = at + 2 * __popc(byte & 15), end = at + 2 * __popc(byte);
  out[0] = pick(load_value(at), load_value(at + 2), low);
  out[1] = pick(load_value(middle - 4), load_value(middle - 2), low >> 16);
  out[2] = pick(load_value(middle), load_value(middle + 2), high);
  out[3] = pick(load_value(end - 4), load_value(end - 2), high >> 16);
}
