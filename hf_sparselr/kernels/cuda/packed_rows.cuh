/* Sixteen packed rows of S of a warp, of any support: from memory to shared memory, and to registers, zeros included.
 *
 * Lanes r and r + 16 have row r, and 64 columns of a stage each. They count where their values lie, and write it down for
 * the lanes that will expand these columns. A lane expands two neighbours of every eight columns: the values that the four
 * lanes of a row read at a time are neighbours, and rows start in banks of their own. The second value is read where both
 * are kept.
 *
 * Compiled for: STRIDE bytes of shared memory for a row's values of a stage, 128 columns.
 */
#define WORDS 2                           /* of 64 columns of a stage */
#define VALUE_BYTES (16 * STRIDE)         /* of a warp's stage */
#define RECORD_STRIDE (16 * WORDS + 16)   /* of a row's stage */
#define RECORD_BYTES (16 * RECORD_STRIDE) /* of a warp's stage */
#define LIST_BYTES 128                    /* of a warp */

__device__ __forceinline__ void copy16(u32 to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void store_record(u32 at, u32 low, u32 high, u32 first, u32 second) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(low), "r"(high), "r"(first), "r"(second) : "memory");
}

__device__ __forceinline__ uint4 load_record(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}

__device__ __forceinline__ void store_pair(u32 at, u32 first, u32 second) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(first), "r"(second) : "memory");
}

__device__ __forceinline__ uint2 load_pair(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}

__device__ __forceinline__ void store_value(u32 at, u16 value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(value) : "memory");
}

/* The value after the one at `at`, if it is wanted: fewer lanes, fewer conflicts. */
__device__ __forceinline__ u32 load_next_if(u32 at, u32 wanted) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %1, 0; @p ld.shared.u16 %0, [%0+2]; }" : "+r"(at) : "r"(wanted));
  return at;
}

/* Asked for here, and not where it is needed; zero where it is not wanted. */
__device__ __forceinline__ void load_mask(const u64 *at, bool wanted, u32 &low, u32 &high) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2]; }"
               : "=&r"(low), "=&r"(high) : "l"(at), "r"((int)wanted));
}

/* A value that the compiler keeps in a register, and does not compute again where it is needed. */
__device__ __forceinline__ u32 keep(u32 value) {
  u32 kept;
  asm volatile("shfl.sync.bfly.b32 %0, %1, 0, 31, -1;" : "=r"(kept) : "r"(value));
  return kept;
}

/* What a lane knows of its row: lanes r and r + 16 have row r of the warp, each a half of a stage's words. */
struct Cursor {
  const u64 *words; /* of its next stage */
  int left;         /* words of the row's part from there on */
  u32 place;        /* of that stage's first value */
  u32 low[WORDS / 2], high[WORDS / 2];
  /* Of this lane in a stage's values, its records, the list of copies, and as one that copies. */
  u32 values, record, listed, copied, further;
  const u16 *from, *more;
};

__device__ __forceinline__ void read_masks(Cursor &c) {
#pragma unroll
  for (int i = 0; i < WORDS / 2; i++) load_mask(c.words + i, i < c.left, c.low[i], c.high[i]);
  c.words += WORDS, c.left -= WORDS;
}

/* Has the values of a stage copied, and says where they will lie; then asks for the masks of the next one. */
__device__ __forceinline__ void prepare(u32 nonzeros, Cursor &c, u32 to, u32 records, int lane) {
  u32 counts[WORDS / 2][2], own = 0;
#pragma unroll
  for (int i = 0; i < WORDS / 2; i++) {
    counts[i][0] = __popc(c.low[i]), counts[i][1] = __popc(c.high[i]);
    own += counts[i][0] + counts[i][1];
  }
  u32 other = __shfl_xor_sync(~0u, own, 16), total = own + other, skipped = c.place & 7;
  u32 at = to + c.values + 2 * (skipped + (lane < 16 ? 0 : other));
#pragma unroll
  for (int i = 0; i < WORDS / 2; i++) {
    store_record(records + c.record + 16 * i, c.low[i], c.high[i], at, at + 2 * counts[i][0]);
    at += 2 * (counts[i][0] + counts[i][1]);
  }
  u32 copies = c.listed & ~127u; /* of the warp: the first value and the units of each row */
  u32 units = min((skipped + total + 7) / 8, (u32)STRIDE / 16), first = c.place - skipped, whole = (nonzeros - first) / 8;
  if (units > whole) { /* the last values of all: those of the last unit one by one */
#pragma unroll 1
    for (u32 i = 8 * whole; lane < 16 && i < nonzeros - first; i++) store_value(to + c.values + 2 * i, c.more[first + i]);
    units = whole;
  }
  if (lane < 16) store_pair(c.listed, first, units);
  c.place = min(c.place + total, nonzeros);
  __syncwarp();
  uint2 which[4]; /* a lane copies a unit of a quarter of the rows, and what is beyond these units of its own row */
#pragma unroll
  for (int i = 0; i < 4; i++) which[i] = load_pair(copies + lane / 8 * 8 + 32 * i);
  u32 unit = lane % 8;
#pragma unroll
  for (int k = 0; k < STRIDE / 128; k++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      copy_if(to + c.copied + 4 * i * STRIDE + 128 * k, c.from + which[i].x + 64 * k, unit + 8 * k < which[i].y);
  const u16 *more = c.more + first;
#pragma unroll
  for (int k = STRIDE / 128 * 8; k < STRIDE / 16; k += 2)
    copy_if(to + c.further + 16 * k, more + 8 * k, lane / 16 + k < units);
  read_masks(c);
}

/* Half a row's 64 columns: this thread's four pairs of neighbours, from the address of the first value. */
__device__ __forceinline__ void expand_half(u32 mask, u32 at, int t, const u32 *below, u32 table, u32 *out) {
  u32 own = mask >> 2 * t, both = own & own >> 1;
  u32 codes = (own & 0x03030303) * 17 + 0x04040404; /* of each pair, for the table of selectors */
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 how = pick(table, 0x10221022, codes >> 16 * (i / 2)) >> 16 * (i % 2);
    u32 place = at + 2 * __popc(mask & below[i]), value = load_value(place);
    out[i] = pick(value, load_next_if(place, both & 1u << 8 * i), how);
  }
}
