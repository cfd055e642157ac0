/* What all parts share: the type of the values, the packed weight, rows of the mask, memory for a call.
 *
 * The parts are compiled as one file: values.c, across.c, few_rows.c, along.c, pairs.c, tiles.c, panels.c, packed.c.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__) && !defined(PORTABLE)
#include <immintrin.h>
#define X86 1
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))
#define PAIRED __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16")))
#else
#define WIDE
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* Eight numbers, at any address of numbers. */
typedef float floats __attribute__((vector_size(32), aligned(4)));
typedef int32_t ints __attribute__((vector_size(32), aligned(4)));

#if defined(BF16)
typedef uint16_t entry;
INLINE float widen(entry value) {
  uint32_t bits = (uint32_t)value << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
INLINE entry narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return value != value ? bits >> 16 | 64 : rounded >> 16; /* NaN stays NaN */
}
#elif defined(FP16)
typedef uint16_t entry;
#ifdef X86
INLINE float widen(entry value) { return _cvtsh_ss(value); }
INLINE entry narrow(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE float widen(entry value) {
  _Float16 half;
  memcpy(&half, &value, 2);
  return half;
}
INLINE entry narrow(float value) {
  _Float16 half = value;
  entry bits;
  memcpy(&bits, &half, 2);
  return bits;
}
#endif
#else
typedef float entry;
INLINE float widen(entry value) { return value; }
INLINE entry narrow(float value) { return value; }
#endif

/* Rounds as `narrow` does. */
INLINE void narrow_eight(floats values, entry *to) {
#if defined(BF16)
  typedef uint32_t words __attribute__((vector_size(32)));
  typedef entry eight __attribute__((vector_size(16), aligned(2)));
  words bits = (words)values, nan = (words)(values != values);
  words rounded = bits + 0x7fff + (bits >> 16 & 1);
  *(eight *)to = __builtin_convertvector(((nan & (bits | 1 << 22)) | (~nan & rounded)) >> 16, eight);
#else
  UNROLL for (int i = 0; i < 8; i++) to[i] = narrow(values[i]);
#endif
}

static void widen_all(const entry *from, float *to, int64_t size) {
  int64_t i = 0;
#if defined(FP16) && defined(X86)
  for (; i + 8 <= size; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
  for (; i < size; i++) to[i] = widen(from[i]);
}

/* In FP32: where it is, or in `space`. */
INLINE const float *in_fp32(const entry *from, float *space, int64_t size) {
#if defined(BF16) || defined(FP16)
  widen_all(from, space, size);
  return space;
#else
  (void)space, (void)size;
  return from;
#endif
}

/* S + B A and a bias, as `packed_weight.PackedWeight` has them. A and B are not read at rank 0; bias may be NULL. */
typedef struct {
  const uint8_t *mask;
  const entry *values, *A, *B, *bias;
  int64_t nonzeros, outs, ins, rank;
} Weight;

static int64_t up_to(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

/* Some rows of S of one of several weights. starts: of its rows, NULL if those of all are. u: numbers of u before its. */
typedef struct {
  const Weight *w;
  const int64_t *starts;
  int64_t u, top;
} Tile;

/* Tile `number` of all, each of `height` rows. Rows of u, one for each of x, are padded to a multiple of `unit`. */
static Tile find_tile(const Weight *weights, const int64_t *starts, int64_t number, int64_t height, int64_t rows,
                      int64_t unit) {
  Tile t = {weights, starts, 0, number * height};
  for (; t.top >= up_to(t.w->outs, height); t.w++) {
    t.top -= up_to(t.w->outs, height), t.u += rows * up_to(t.w->rank, unit);
    if (starts) t.starts += t.w->outs + 1;
  }
  return t;
}

static int32_t set_bits[256][8]; /* of a byte, in order */
__attribute__((constructor)) static void make_set_bits(void) {
  for (int byte = 0; byte < 256; byte++)
    for (int bit = 0, rank = 0; bit < 8; bit++)
      if (byte >> bit & 1) set_bits[byte][rank++] = bit;
}

/* starts: the first value of each row, and the end. Returns how many values the mask keeps. */
static int64_t count(const Weight *w, int64_t *starts, int threads) {
  int64_t stride = (w->ins + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads) if (w->outs * stride > 1 << 16)
  for (int64_t row = 0; row < w->outs; row++) {
    const uint8_t *m = w->mask + row * stride;
    int64_t kept = 0, byte = 0;
    for (uint64_t word; byte + 8 <= stride; byte += 8) {
      memcpy(&word, m + byte, 8);
      kept += __builtin_popcountll(word);
    }
    for (; byte < stride; byte++) kept += __builtin_popcount(m[byte]);
    starts[row + 1] = kept;
  }
  starts[0] = 0;
  for (int64_t row = 0; row < w->outs; row++) starts[row + 1] += starts[row];
  return starts[w->outs];
}

/* The columns of the set bits, in order; bits[byte]: those of a byte, times `scale`. Writes up to 7 more. Ends after
   `most`. */
INLINE int64_t list_columns(const uint8_t *m, int64_t bytes, int32_t *columns, const int32_t bits[256][8], int scale,
                            int64_t most) {
  int64_t listed = 0;
  for (int64_t byte = 0; byte < bytes && listed < most; byte++) {
    int kept = m[byte];
    *(ints *)(columns + listed) = *(const ints *)bits[kept] + (int32_t)(8 * byte * scale);
    listed += __builtin_popcount(kept);
  }
  return listed < most ? listed : most;
}

INLINE int this_thread(void) {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

enum { LINE = 64, KEPT = 1 << 23 }; /* bytes: of a cache line, and of memory that a thread keeps from call to call */

static int64_t lines(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

static __thread char *kept_memory;
static __thread int64_t kept_bytes;

/* Memory for the length of a call, NULL if there is none. What the system gives anew it fills with zeros, which takes
   longer than small products: a thread keeps what it had, up to a limit. */
static void *borrow(int64_t bytes) {
  if (bytes > KEPT) return aligned_alloc(LINE, lines(bytes));
  if (bytes > kept_bytes) {
    free(kept_memory);
    kept_bytes = lines(bytes * 2 < KEPT ? bytes * 2 : KEPT);
    kept_memory = aligned_alloc(LINE, kept_bytes);
    if (!kept_memory) kept_bytes = 0;
  }
  return kept_memory;
}

static void give_back(void *memory) {
  if (memory != kept_memory) free(memory);
}

/* The next `bytes` of borrowed memory. */
static void *take(char **memory, int64_t bytes) {
  void *taken = *memory;
  *memory += lines(bytes);
  return taken;
}
