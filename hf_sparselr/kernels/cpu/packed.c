/* y = x S^T + (x A^T) B^T + bias from the packed S, and S in full. Sums are in FP32, results are rounded once.
 *
 * Compiled once for each type of the values: -DBF16, -DFP16 or neither (FP32). x86-64 with AVX2, or any other processor
 * by the compiler's own vectors.
 *
 * Two ways. "Across": a few columns of a row of S are expanded to dense ones and multiplied with ACROSS rows of x, for up
 * to twice as many. "Along": for more rows, x is transposed, and every kept value is multiplied with that column of WIDTH rows at once, so
 * that only kept values cost time.
 *
 * Nothing is read beyond `nonzeros` values or beyond a row of the mask, whatever the mask holds: the values of each row
 * are counted in the mask first, and every loop over values ends where its row's count ends.
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

enum { ACROSS = 8, AHEAD = 4096, SHORT = 16, BAND = 64, STEP = 32768, MOST = 256 };
/* ACROSS: rows of x. AHEAD: bytes, memory is read while earlier values are multiplied. SHORT, BAND: rows of S
   that are used again while they are in a cache. MOST: rows of x that are transposed at a time. STEP: bytes of transposed x that are used over and over, so that they stay in the nearest cache. */

/* What a value is */

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
  if (value != value) return bits >> 16 | 64; /* NaN stays NaN */
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
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

enum { WIDTHS = 4 };
static const int widths[WIDTHS] = {1, 16, 32, 64};
static int32_t set_bits[WIDTHS][256][8]; /* of a byte, in order, times a width */
static int32_t ranks_in[256][8];  /* each bit's rank among those set, -1 for the others */
__attribute__((constructor)) static void make_tables(void) {
  for (int byte = 0; byte < 256; byte++)
    for (int bit = 0, rank = 0; bit < 8; bit++) {
      ranks_in[byte][bit] = byte >> bit & 1 ? rank : -1;
      if (byte >> bit & 1) {
        for (int i = 0; i < WIDTHS; i++) set_bits[i][byte][rank] = bit * widths[i];
        rank++;
      }
    }
}

/* starts: the first value of each row. Returns how many values the mask keeps. */
static int64_t count(const uint8_t *mask, int64_t *starts, int64_t outs, int64_t stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < outs; row++) {
    const uint8_t *m = mask + row * stride;
    int64_t kept = 0, byte = 0;
    for (uint64_t word; byte + 8 <= stride; byte += 8) {
      memcpy(&word, m + byte, 8);
      kept += __builtin_popcountll(word);
    }
    for (; byte < stride; byte++) kept += __builtin_popcount(m[byte]);
    starts[row + 1] = kept;
  }
  starts[0] = 0;
  for (int64_t row = 0; row < outs; row++) starts[row + 1] += starts[row];
  return starts[outs];
}

static float dot(const float *a, const float *b, int64_t size) {
  float lanes[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16)
    for (int j = 0; j < 16; j++) lanes[j] += a[i + j] * b[i + j];
  for (int j = 0; i < size; i++, j++) lanes[j] += a[i] * b[i];
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
  return lanes[0];
}

/* The columns of the set bits, times widths[index], in order; writes up to 7 more. Ends after `most`. */
INLINE int64_t list_columns(const uint8_t *m, int64_t bytes, int32_t *columns, int index, int64_t most) {
  int64_t listed = 0;
  for (int64_t byte = 0; byte < bytes && listed < most; byte++) {
    const int32_t *bits = set_bits[index][m[byte]];
    int32_t before = 8 * byte * widths[index];
    for (int j = 0; j < 8; j++) columns[listed + j] = before + bits[j];
    listed += __builtin_popcount(m[byte]);
  }
  return listed < most ? listed : most;
}

/* Across: one row of S times `count` rows of x */

typedef struct {
  const float *x;     /* FP32, `stride` apart, zero behind the end for 64 columns */
  const entry *given; /* as it came, laid out alike */
  int64_t stride;
} Inputs;

#ifdef X86
INLINE __m256 read_eight(const entry *v) {
#if defined(BF16)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)v)), 16));
#elif defined(FP16)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)v));
#else
  return _mm256_loadu_ps(v);
#endif
}

/* out[r] += the sum of sums[r], for 8 rows or fewer. */
INLINE void add_up(const __m256 *sums, float *out, const int rows) {
  __m256 s[8];
  UNROLL for (int r = 0; r < 8; r++) s[r] = r < rows ? sums[r] : _mm256_setzero_ps();
  __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  __m256 total = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  _mm256_storeu_ps(out, _mm256_add_ps(total, _mm256_loadu_ps(out)));
}

INLINE void narrow_step(__m256 *sums, uint8_t bits, const entry *v, const Inputs *in, int64_t column, const int rows) {
  __m256i place = _mm256_loadu_si256((const __m256i *)ranks_in[bits]);
  __m256 entries = _mm256_permutevar8x32_ps(read_eight(v), place);
  entries = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), entries);
  UNROLL for (int r = 0; r < rows; r++)
    sums[r] = _mm256_fmadd_ps(entries, _mm256_loadu_ps(in->x + r * in->stride + column), sums[r]);
}

/* Adds to `out`, of 8 rows. left: how many values there are from v on. */
INLINE void narrow_row(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, float *out,
                       const int rows) {
  __m256 even[ACROSS], odd[ACROSS];
  UNROLL for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm256_setzero_ps();
  int64_t byte = 0;
  for (; byte + 1 < bytes && left >= 16; byte += 2) {
    int first = __builtin_popcount(m[byte]), both = first + __builtin_popcount(m[byte + 1]);
    __builtin_prefetch((const char *)v + AHEAD);
    narrow_step(even, m[byte], v, in, 8 * byte, rows);
    narrow_step(odd, m[byte + 1], v + first, in, 8 * byte + 8, rows);
    v += both, left -= both;
  }
  for (; byte < bytes; byte++) {
    entry last[8] = {0}; /* nothing is read beyond the values */
    int kept = __builtin_popcount(m[byte]);
    if (kept > left) kept = left;
    for (int i = 0; i < kept; i++) last[i] = v[i];
    narrow_step(even, m[byte], last, in, 8 * byte, rows);
    v += kept, left -= kept;
  }
  UNROLL for (int r = 0; r < rows; r++) even[r] = _mm256_add_ps(even[r], odd[r]);
  add_up(even, out, rows);
}

/* The next values at the set bits of 16 columns, zero elsewhere. 16 are read, wanted or not. */
WIDE INLINE __m512 expand(__mmask16 bits, const entry *v) {
#if defined(BF16)
  __m256i entries = _mm256_maskz_expand_epi16(bits, _mm256_loadu_si256((const __m256i *)v));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(entries), 16));
#elif defined(FP16)
  return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(bits, _mm256_loadu_si256((const __m256i *)v)));
#else
  return _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(v));
#endif
}

WIDE INLINE void wide_row(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t byte, int64_t bytes,
                          float *out, const int rows) {
  __m512 even[ACROSS], odd[ACROSS];
  UNROLL for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
  for (; byte + 3 < bytes && left >= 32; byte += 4) {
    uint32_t bits;
    memcpy(&bits, m + byte, 4);
    int first = __builtin_popcount(bits & 0xffff), both = __builtin_popcount(bits);
    __builtin_prefetch((const char *)v + AHEAD);
    __m512 low = expand(bits, v), high = expand(bits >> 16, v + first);
    UNROLL for (int r = 0; r < rows; r++) {
      const float *x = in->x + r * in->stride + 8 * byte;
      even[r] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x), even[r]);
      odd[r] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + 16), odd[r]);
    }
    v += both, left -= both;
  }
  for (; byte < bytes; byte++) {
    entry last[16] = {0}; /* nothing is read beyond the values */
    int kept = __builtin_popcount(m[byte]);
    if (kept > left) kept = left;
    for (int i = 0; i < kept; i++) last[i] = v[i];
    __m512 entries = expand(m[byte], last);
    UNROLL for (int r = 0; r < rows; r++)
      even[r] = _mm512_fmadd_ps(entries, _mm512_loadu_ps(in->x + r * in->stride + 8 * byte), even[r]);
    v += kept, left -= kept;
  }
  __m256 sums[ACROSS];
  UNROLL for (int r = 0; r < rows; r++) {
    __m512 total = _mm512_add_ps(even[r], odd[r]);
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(total), 1));
    sums[r] = _mm256_add_ps(_mm512_castps512_ps256(total), high);
  }
  add_up(sums, out, rows);
}

#if defined(BF16) && (defined(__clang__) || __GNUC__ >= 10) /* that know these instructions */
#define HAS_PAIRED 1
/* 32 columns at a time, multiplied in pairs of BF16. */
PAIRED INLINE void paired_row(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes,
                              float *out, const int rows) {
  __m512 even[ACROSS], odd[ACROSS];
  UNROLL for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
  int64_t byte = 0;
  for (; byte + 7 < bytes && left >= 64; byte += 8) {
    uint64_t bits;
    memcpy(&bits, m + byte, 8);
    int first = __builtin_popcount((uint32_t)bits), both = __builtin_popcountll(bits);
    __builtin_prefetch((const char *)v + AHEAD);
    __m512i low = _mm512_maskz_expand_epi16((__mmask32)bits, _mm512_loadu_si512(v));
    __m512i high = _mm512_maskz_expand_epi16((__mmask32)(bits >> 32), _mm512_loadu_si512(v + first));
    UNROLL for (int r = 0; r < rows; r++) {
      const entry *x = in->given + r * in->stride + 8 * byte;
      even[r] = _mm512_dpbf16_ps(even[r], (__m512bh)low, (__m512bh)_mm512_loadu_si512(x));
      odd[r] = _mm512_dpbf16_ps(odd[r], (__m512bh)high, (__m512bh)_mm512_loadu_si512(x + 32));
    }
    v += both, left -= both;
  }
  __m256 sums[ACROSS];
  UNROLL for (int r = 0; r < rows; r++) {
    __m512 total = _mm512_add_ps(even[r], odd[r]);
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(total), 1));
    sums[r] = _mm256_add_ps(_mm512_castps512_ps256(total), high);
  }
  add_up(sums, out, rows);
  wide_row(m, v, left, in, byte, bytes, out, rows);
}
#endif

/* A function for each number of rows, so that the sums stay in registers. */
#define EACH(CALL) \
  switch (rows) { \
    case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; case 4: CALL(4); break; \
    case 5: CALL(5); break; case 6: CALL(6); break; case 7: CALL(7); break; default: CALL(8); \
  }

static void across_narrow(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, float *out,
                          int rows) {
#define CALL(ROWS) narrow_row(m, v, left, in, bytes, out, ROWS)
  EACH(CALL)
#undef CALL
}

WIDE static void across_wide(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes,
                             float *out, int rows) {
#define CALL(ROWS) wide_row(m, v, left, in, 0, bytes, out, ROWS)
  EACH(CALL)
#undef CALL
}

#ifdef HAS_PAIRED
PAIRED static void across_paired(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes,
                                 float *out, int rows) {
#define CALL(ROWS) paired_row(m, v, left, in, bytes, out, ROWS)
  EACH(CALL)
#undef CALL
}
#endif

#else /* not x86 */

static void across_plain(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, float *out,
                         int rows) {
  int32_t columns[520];
  float wide[512];
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    int64_t part = bytes - byte < 64 ? bytes - byte : 64, kept = list_columns(m + byte, part, columns, 0, left);
    widen_all(v, wide, kept);
    for (int r = 0; r < rows; r++) {
      const float *x = in->x + r * in->stride + 8 * byte;
      float sum = 0;
      for (int64_t i = 0; i < kept; i++) sum += wide[i] * x[columns[i]];
      out[r] += sum;
    }
    v += kept, left -= kept;
  }
}
#endif

typedef void (*across)(const uint8_t *, const entry *, int64_t, const Inputs *, int64_t, float *, int);

/* level: 0 AVX2 or no x86, 1 AVX-512, as far as the processor has it. */
static across choose_across(int level, int *paired) {
  *paired = 0;
#ifdef X86
  int wide = level > 0 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl");
#ifdef HAS_PAIRED
  *paired = wide && __builtin_cpu_supports("avx512bf16");
  if (*paired) return across_paired;
#endif
  return wide ? across_wide : across_narrow;
#else
  return across_plain;
#endif
}

/* Along: sums[WIDTH] += values[i] * x[columns[i]][WIDTH], for all i. SETS of sums, so that one addition need not wait for
   the last. */

#define ALONG(NAME, TARGET, BYTES, COUNT, SETS)                                                                 \
  TARGET static void NAME(float *sums, const int32_t *columns, const float *values, int64_t size, const float *x) { \
    typedef float vec __attribute__((vector_size(BYTES), aligned(4)));                                          \
    enum { LANES = BYTES / 4 };                                                                                 \
    vec s[SETS][COUNT];                                                                                         \
    UNROLL for (int j = 0; j < COUNT; j++) s[0][j] = *(const vec *)(sums + j * LANES);                          \
    UNROLL for (int set = 1; set < SETS; set++)                                                                 \
      UNROLL for (int j = 0; j < COUNT; j++) s[set][j] = s[0][j] - s[0][j];                                     \
    int64_t i = 0;                                                                                              \
    for (; i + SETS <= size; i += SETS)                                                                         \
      UNROLL for (int set = 0; set < SETS; set++) {                                                             \
        const float *row = x + columns[i + set];                                                                \
        UNROLL for (int j = 0; j < COUNT; j++) s[set][j] += values[i + set] * *(const vec *)(row + j * LANES);  \
      }                                                                                                         \
    for (; i < size; i++)                                                                                       \
      UNROLL for (int j = 0; j < COUNT; j++) s[0][j] += values[i] * *(const vec *)(x + columns[i] + j * LANES); \
    UNROLL for (int set = 1; set < SETS; set++)                                                                 \
      UNROLL for (int j = 0; j < COUNT; j++) s[0][j] += s[set][j];                                              \
    UNROLL for (int j = 0; j < COUNT; j++) *(vec *)(sums + j * LANES) = s[0][j];                                \
  }
#ifdef X86
ALONG(along_16, , 32, 2, 4)
ALONG(along_32, , 32, 4, 2)
ALONG(along_64, , 32, 8, 1)
ALONG(along_wide_16, __attribute__((target("avx512f"))), 64, 1, 8)
ALONG(along_wide_32, __attribute__((target("avx512f"))), 64, 2, 4)
ALONG(along_wide_64, __attribute__((target("avx512f"))), 64, 4, 2)
#else
ALONG(along_16, , 16, 4, 2)
ALONG(along_32, , 16, 8, 1)
ALONG(along_64, , 16, 16, 1)
#endif

typedef void (*along)(float *, const int32_t *, const float *, int64_t, const float *);

/* index: into `widths`. */
static along choose_along(int level, int64_t rows, int *index) {
  *index = rows <= 16 ? 1 : rows <= 32 ? 2 : 3;
#ifdef X86
  static const along wide[] = {along_wide_16, along_wide_32, along_wide_64};
  if (level > 0 && __builtin_cpu_supports("avx512f")) return wide[*index - 1];
#endif
  static const along plain[] = {along_16, along_32, along_64};
  return plain[*index - 1];
}

/* The product */

typedef struct {
  const uint8_t *mask;
  const entry *values, *A, *B, *bias;
  const int64_t *starts;
  int64_t outs, ins, rank;
} Weight;

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

/* Memory for the length of a call. What the system gives anew it fills with zeros, which takes longer than small products:
   a thread keeps what it had, up to a limit. */
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

static int multiply_across(const Weight *w, const entry *x, entry *y, int64_t rows, across multiply, int threads) {
  int64_t bytes = (w->ins + 7) / 8, stride = (8 * bytes + 127) / 64 * 64, ranks = w->rank;
  int64_t x_bytes = rows * stride * 4, u_bytes = (rows + 7) / 8 * 8 * (ranks + 1) * 4;
  int64_t given_bytes = rows * stride * sizeof(entry), part_bytes = threads * (ranks + 1) * 4; /* of a row of B */
  char *memory = borrow(lines(x_bytes) + lines(u_bytes) + lines(given_bytes) + lines(part_bytes)), *rest = memory;
  if (!memory) return 1;
  float *wide = take(&rest, x_bytes), *u = take(&rest, u_bytes);
  entry *given = take(&rest, given_bytes);
  float *parts = take(&rest, part_bytes);
  const int side = rows == 1 ? 1 : ACROSS; /* of u: (groups of rows, rank, side) */
  memset(given, 0, rows * stride * sizeof(entry)); /* what is read behind the ends is zero */
  for (int64_t r = 0; r < rows; r++) memcpy(given + r * stride, x + r * w->ins, w->ins * sizeof(entry));
  widen_all(given, wide, rows * stride);
#pragma omp parallel num_threads(threads)
  {
    float *part = parts + this_thread() * (ranks + 1);
#pragma omp for schedule(static)
    for (int64_t q = 0; q < ranks; q++) {
      float part[512];
      for (int64_t r = 0; r < (rows + side - 1) / side * side; r++) u[(r / side * ranks + q) * side + r % side] = 0;
      for (int64_t k = 0; k < w->ins; k += 512) {
        int64_t size = w->ins - k < 512 ? w->ins - k : 512;
        const float *factors = in_fp32(w->A + q * w->ins + k, part, size);
        for (int64_t r = 0; r < rows; r++)
          u[(r / side * ranks + q) * side + r % side] += dot(factors, wide + r * stride + k, size);
      }
    }
#pragma omp for schedule(static)
    for (int64_t top = 0; top < w->outs; top += SHORT)
      for (int64_t first = 0; first < rows; first += ACROSS) {
        int few = rows - first < ACROSS ? rows - first : ACROSS;
        Inputs in = {wide + first * stride, given + first * stride, stride};
        for (int64_t row = top; row < w->outs && row < top + SHORT; row++) {
          float sums[ACROSS] = {0};
          multiply(w->mask + row * bytes, w->values + w->starts[row], w->starts[w->outs] - w->starts[row], &in, bytes,
                   sums, few);
          if (rows == 1) sums[0] += dot(in_fp32(w->B + row * ranks, part, ranks), u, ranks);
          else for (int64_t q = 0; q < ranks; q++) {
            float factor = widen(w->B[row * ranks + q]);
            for (int r = 0; r < ACROSS; r++) sums[r] += factor * u[(first / ACROSS * ranks + q) * ACROSS + r];
          }
          float more = w->bias ? widen(w->bias[row]) : 0;
          for (int r = 0; r < few; r++) y[(first + r) * w->outs + row] = narrow(w->bias ? sums[r] + more : sums[r]);
        }
      }
  }
  return give_back(memory), 0;
}

/* What threads write while they multiply a band of S. */
typedef struct {
  float *sums;      /* (chunks, BAND, width) */
  int32_t *columns; /* (BAND, listed) */
  float *values;
} Space;

/* One band of rows of S times `chunks` chunks of transposed x: xt (chunks, all columns, width), ut (chunks, rank, width). */
static void multiply_band(const Weight *w, int64_t top, int64_t rows, const float *xt, const float *ut, int64_t chunks,
                          Space space, int index, along add) {
  int width = widths[index];
  int64_t bytes = (w->ins + 7) / 8, step = STEP / 4 / width / 8, listed = 8 * step + 8; /* step: bytes of the mask */
  int64_t at[BAND], kept[BAND];
  const float *values[BAND];
  memset(space.sums, 0, chunks * BAND * width * sizeof(float));
  for (int64_t i = 0; i < rows; i++) at[i] = w->starts[top + i];
  for (int64_t byte = 0; byte < bytes; byte += step) {
    int64_t part = bytes - byte < step ? bytes - byte : step;
    for (int64_t i = 0; i < rows; i++) {
      int64_t left = w->starts[top + i + 1] - at[i];
      const uint8_t *m = w->mask + (top + i) * bytes + byte;
      kept[i] = list_columns(m, part, space.columns + i * listed, index, left);
      values[i] = in_fp32(w->values + at[i], space.values + i * listed, kept[i]);
      at[i] += kept[i];
      for (int64_t ahead = 0; ahead < kept[i]; ahead += 64 / sizeof(entry)) /* for the next step */
        __builtin_prefetch(w->values + at[i] + ahead);
    }
    for (int64_t c = 0; c < chunks; c++)
      for (int64_t i = 0; i < rows; i++)
        add(space.sums + (c * BAND + i) * width, space.columns + i * listed, values[i], kept[i],
            xt + (c * 8 * bytes + 8 * byte) * width);
  }
  for (int64_t q = 0; q < w->rank; q += 128) {
    int64_t size = w->rank - q < 128 ? w->rank - q : 128;
    for (int64_t j = 0; j < size; j++) space.columns[j] = j * width;
    for (int64_t i = 0; i < rows; i++) {
      const float *factors = in_fp32(w->B + (top + i) * w->rank + q, space.values, size);
      for (int64_t c = 0; c < chunks; c++)
        add(space.sums + (c * BAND + i) * width, space.columns, factors, size, ut + (c * w->rank + q) * width);
    }
  }
}

/* x^T in chunks of `width` rows: (chunks, columns, width), zero where there is no row. */
static void transpose(const entry *x, float *xt, int64_t rows, int64_t ins, int64_t columns, int width) {
#pragma omp for schedule(static)
  for (int64_t k = 0; k < ins; k += 16)
    for (int64_t r = 0; r < (rows + width - 1) / width * width; r++)
      for (int64_t j = k; j < k + 16 && j < ins; j++)
        xt[(r / width * columns + j) * width + r % width] = r < rows ? widen(x[r * ins + j]) : 0;
}

static int multiply_along(const Weight *w, const entry *x, entry *y, int64_t rows, int index, along add, int threads) {
  int width = widths[index];
  int64_t columns = (w->ins + 7) / 8 * 8, most = rows < MOST ? rows : MOST, chunks = (most + width - 1) / width;
  int64_t listed = STEP / 4 / width + 8, space = chunks * BAND * width;
  int64_t xt_bytes = chunks * columns * width * 4, ut_bytes = (chunks * w->rank + 1) * width * 4;
  int64_t list_bytes = (threads * BAND * listed + 128) * 4;
  char *memory = borrow(lines(xt_bytes) + lines(ut_bytes) + lines(threads * space * 4) + 2 * lines(list_bytes));
  char *rest = memory;
  if (!memory) return 1;
  float *xt = take(&rest, xt_bytes), *ut = take(&rest, ut_bytes), *sums = take(&rest, threads * space * 4);
  float *values = take(&rest, list_bytes);
  int32_t *lists = take(&rest, list_bytes);
  memset(xt, 0, xt_bytes);
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < rows; first += most) {
    int64_t few = rows - first < most ? rows - first : most, parts = (few + width - 1) / width;
    int thread = this_thread();
    Space mine = {sums + thread * space, lists + thread * BAND * listed, values + thread * BAND * listed};
    transpose(x + first * w->ins, xt, few, w->ins, columns, width);
#pragma omp for schedule(static)
    for (int64_t q = 0; q < w->rank; q++) {
      for (int64_t c = 0; c < parts; c++) memset(ut + (c * w->rank + q) * width, 0, width * sizeof(float));
      for (int j = 0; j < 128; j++) mine.columns[j] = j * width;
      for (int64_t k = 0; k < w->ins; k += 128) {
        int64_t size = w->ins - k < 128 ? w->ins - k : 128;
        const float *factors = in_fp32(w->A + q * w->ins + k, mine.values, size);
        for (int64_t c = 0; c < parts; c++)
          add(ut + (c * w->rank + q) * width, mine.columns, factors, size, xt + (c * columns + k) * width);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t top = 0; top < w->outs; top += BAND) {
      int64_t band = w->outs - top < BAND ? w->outs - top : BAND;
      multiply_band(w, top, band, xt, ut, parts, mine, index, add);
      for (int64_t r = 0; r < few; r++)
        for (int64_t i = 0; i < band; i++) {
          float sum = mine.sums[(r / width * BAND + i) * width + r % width];
          y[(first + r) * w->outs + top + i] = narrow(w->bias ? sum + widen(w->bias[top + i]) : sum);
        }
    }
  }
  return give_back(memory), 0;
}

/* x: (rows, ins), y: (rows, outs), rows after each other. level: see choose_across.
   Returns 0; 1: no memory; 2: the mask does not keep `nonzeros` values but *kept. */
int multiply(const uint8_t *mask, const entry *values, const entry *A, const entry *B, const entry *bias,
             const entry *x, entry *y, int64_t nonzeros, int64_t rows, int64_t outs, int64_t ins, int64_t rank,
             int level, int threads, int64_t *kept) {
  int64_t *starts = malloc((outs + 1) * 8);
  if (!starts) return 1;
  *kept = count(mask, starts, outs, (ins + 7) / 8, threads);
  if (*kept != nonzeros) return free(starts), 2;
  Weight weight = {mask, values, A, B, bias, starts, outs, ins, rank};
  int paired, index, failed;
  across few = choose_across(level, &paired);
  along many = choose_along(level, rows, &index);
  if (rows <= 2 * ACROSS || paired) failed = multiply_across(&weight, x, y, rows, few, threads);
  else failed = multiply_along(&weight, x, y, rows, index, many, threads);
  return free(starts), failed;
}

/* S in full */

static void plain_unpack(const uint8_t *m, const entry *v, int64_t left, entry *row, int64_t from, int64_t ins) {
  for (int64_t i = from; i < ins; i++) {
    int kept = (m[i / 8] >> i % 8 & 1) && left > 0;
    row[i] = kept ? *v : 0;
    v += kept, left -= kept;
  }
}

#ifdef X86
WIDE static void wide_unpack(const uint8_t *m, const entry *v, int64_t left, entry *row, int64_t ins) {
  int64_t i = 0;
  enum { SIDE = 64 / sizeof(entry) };
  for (; i + SIDE <= ins && left >= SIDE; i += SIDE) {
    uint32_t bits = 0;
    memcpy(&bits, m + i / 8, SIDE / 8);
    __m512i entries = _mm512_loadu_si512(v);
    entries = SIDE == 32 ? _mm512_maskz_expand_epi16(bits, entries) : _mm512_maskz_expand_epi32(bits, entries);
    _mm512_storeu_si512(row + i, entries);
    v += __builtin_popcount(bits), left -= __builtin_popcount(bits);
  }
  plain_unpack(m, v, left, row, i, ins);
}
#endif

/* dense: (outs, ins). Returns as `multiply`. */
int unpack(const uint8_t *mask, const entry *values, entry *dense, int64_t nonzeros, int64_t outs, int64_t ins,
           int level, int threads, int64_t *kept) {
  int64_t *starts = malloc((outs + 1) * 8), stride = (ins + 7) / 8;
  if (!starts) return 1;
  *kept = count(mask, starts, outs, stride, threads);
  if (*kept != nonzeros) return free(starts), 2;
#ifdef X86
  int wide = level > 0 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl");
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < outs; row++) {
    const uint8_t *m = mask + row * stride;
    int64_t left = nonzeros - starts[row];
#ifdef X86
    if (wide) {
      wide_unpack(m, values + starts[row], left, dense + row * ins, ins);
      continue;
    }
#endif
    plain_unpack(m, values + starts[row], left, dense + row * ins, 0, ins);
  }
  return free(starts), 0;
}
