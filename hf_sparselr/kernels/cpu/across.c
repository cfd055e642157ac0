/* Few rows of x: some columns of a row of S are expanded to dense ones and multiplied with up to ACROSS rows of x.
 *
 * A row function leaves eight partial sums for each row of x. `finish` adds the factors, adds up, and rounds.
 */

enum { ACROSS = 8, SHORT = 16, AHEAD = 4096 };
/* ACROSS: rows of x. SHORT: rows of S that are used again while they are in a cache. AHEAD: bytes, memory is read while
   earlier values are multiplied. */

typedef struct {
  const float *x;     /* FP32, `stride` apart, zero behind the end for 64 columns; in the order of `spread` */
  const entry *given; /* as it came, laid out alike */
  int64_t stride;
} Inputs;

/* sums[r] = partial sums of one row of S times row r of x. left: how many values there are from v on. */
typedef void (*across)(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, floats *sums,
                       int rows);

/* A function for each number of rows, so that the sums stay in registers. */
#define EACH(CALL) \
  switch (rows) { \
    case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; case 4: CALL(4); break; \
    case 5: CALL(5); break; case 6: CALL(6); break; case 7: CALL(7); break; default: CALL(8); \
  }

#ifdef X86
#if defined(BF16) || defined(FP16)
static uint8_t places[256][16]; /* the bytes of each bit's value among those kept, 128 for the others, which gives zero */
#else
static int8_t places[256][8]; /* each bit's rank among those set, -1 for the others */
#endif
__attribute__((constructor)) static void make_places(void) {
  for (int byte = 0; byte < 256; byte++)
    for (int bit = 0, rank = 0; bit < 8; bit++) {
      int kept = byte >> bit & 1;
#if defined(BF16) || defined(FP16)
      places[byte][2 * bit] = kept ? 2 * rank : 128;
      places[byte][2 * bit + 1] = kept ? 2 * rank + 1 : 128;
#else
      places[byte][bit] = kept ? rank : -1;
#endif
      rank += kept;
    }
}

#if defined(BF16)
enum { APART = 1 }; /* even columns come first: a 32-bit lane then holds two values that need no moving */
#else
enum { APART = 0 };
#endif

/* 16 columns of S: values at the set bits of two bytes, zero elsewhere. Eight are read from v and from w on. */
INLINE void expand_16(uint64_t first, uint64_t second, const entry *v, const entry *w, __m256 *low, __m256 *high) {
#if defined(BF16) || defined(FP16)
  __m128i begin = _mm_loadu_si128((const __m128i *)v), end = _mm_loadu_si128((const __m128i *)w);
  begin = _mm_shuffle_epi8(begin, _mm_loadu_si128((const __m128i *)places[first]));
  end = _mm_shuffle_epi8(end, _mm_loadu_si128((const __m128i *)places[second]));
#if defined(BF16)
  __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(begin), end, 1);
  *low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  *high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
#else
  *low = _mm256_cvtph_ps(begin), *high = _mm256_cvtph_ps(end);
#endif
#else
  __m256i begin = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)places[first]));
  __m256i end = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)places[second]));
  *low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), begin);
  *low = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(begin, 31)), *low);
  *high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(w), end);
  *high = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(end, 31)), *high);
#endif
}

/* Returns where the values go on. */
INLINE const entry *narrow_step(uint64_t first, uint64_t second, const entry *v, const float *x, int64_t stride,
                                __m256 *even, __m256 *odd, const int rows) {
  __m256 low, high;
  const entry *w = v + __builtin_popcountll(first);
  expand_16(first, second, v, w, &low, &high);
  UNROLL for (int r = 0; r < rows; r++) even[r] = _mm256_fmadd_ps(low, _mm256_loadu_ps(x + r * stride), even[r]);
  UNROLL for (int r = 0; r < rows; r++) odd[r] = _mm256_fmadd_ps(high, _mm256_loadu_ps(x + r * stride + 8), odd[r]);
  return w + __builtin_popcountll(second);
}

INLINE void narrow_row(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, floats *sums,
                       const int rows) {
  const int sets = rows == 1 ? 4 : rows <= 3 ? 2 : 1; /* of sums: with few rows an addition must not wait for the last */
  __m256 s[4][ACROSS];
  UNROLL for (int set = 0; set < sets; set++)
    UNROLL for (int r = 0; r < rows; r++) s[set][r] = _mm256_setzero_ps();
  int64_t byte = 0;
  for (; byte + 3 < bytes && left >= 32; byte += 4) {
    const float *x = in->x + 8 * byte;
    __builtin_prefetch((const char *)v + AHEAD);
    const entry *next = narrow_step(m[byte], m[byte + 1], v, x, in->stride, s[0], s[1 % sets], rows);
    next = narrow_step(m[byte + 2], m[byte + 3], next, x + 16, in->stride, s[2 % sets], s[3 % sets], rows);
    left -= next - v, v = next;
  }
  for (; byte < bytes; byte += 2) {
    entry last[16] = {0}; /* nothing is read beyond the values */
    uint64_t first = m[byte], second = byte + 1 < bytes ? m[byte + 1] : 0;
    int kept = __builtin_popcountll(first) + __builtin_popcountll(second);
    if (kept > left) kept = left;
    for (int i = 0; i < kept; i++) last[i] = v[i];
    narrow_step(first, second, last, in->x + 8 * byte, in->stride, s[0], s[1 % sets], rows);
    v += kept, left -= kept;
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int set = 1; set < sets; set++) s[0][r] = _mm256_add_ps(s[0][r], s[set][r]);
    _mm256_storeu_ps((float *)(sums + r), s[0][r]);
  }
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

WIDE INLINE void store_halves(const __m512 *even, const __m512 *odd, floats *sums, const int rows) {
  UNROLL for (int r = 0; r < rows; r++) {
    __m512 total = _mm512_add_ps(even[r], odd[r]);
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(total), 1));
    _mm256_storeu_ps((float *)(sums + r), _mm256_add_ps(_mm512_castps512_ps256(total), high));
  }
}

/* From column 8 * byte on. */
WIDE INLINE void wide_columns(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t byte,
                              int64_t bytes, __m512 *even, __m512 *odd, const int rows) {
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
}

WIDE INLINE void wide_row(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, floats *sums,
                          const int rows) {
  __m512 even[ACROSS], odd[ACROSS];
  UNROLL for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_ps();
  wide_columns(m, v, left, in, 0, bytes, even, odd, rows);
  store_halves(even, odd, sums, rows);
}

#if defined(BF16) && (defined(__clang__) || __GNUC__ >= 10) /* that know these instructions */
#define HAS_PAIRED 1
/* 32 columns at a time, multiplied in pairs of BF16. */
PAIRED INLINE void paired_row(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes,
                              floats *sums, const int rows) {
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
  wide_columns(m, v, left, in, byte, bytes, even, odd, rows);
  store_halves(even, odd, sums, rows);
}
#endif

static void across_narrow(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, floats *sums,
                          int rows) {
#define CALL(ROWS) narrow_row(m, v, left, in, bytes, sums, ROWS)
  EACH(CALL)
#undef CALL
}

WIDE static void across_wide(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes,
                             floats *sums, int rows) {
#define CALL(ROWS) wide_row(m, v, left, in, bytes, sums, ROWS)
  EACH(CALL)
#undef CALL
}

#ifdef HAS_PAIRED
PAIRED static void across_paired(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes,
                                 floats *sums, int rows) {
#define CALL(ROWS) paired_row(m, v, left, in, bytes, sums, ROWS)
  EACH(CALL)
#undef CALL
}
#endif

#else /* not x86 */

enum { APART = 0 };

static void across_plain(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, floats *sums,
                         int rows) {
  int32_t columns[520];
  float wide[520];
  for (int r = 0; r < rows; r++) sums[r] = (floats){0};
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    int64_t part = bytes - byte < 64 ? bytes - byte : 64;
    int64_t kept = list_columns(m + byte, part, columns, set_bits, 1, left);
    widen_all(v, wide, kept);
    for (int r = 0; r < rows; r++) {
      const float *x = in->x + r * in->stride + 8 * byte;
      for (int64_t i = 0; i < kept; i++) sums[r][i % 8] += wide[i] * x[columns[i]];
    }
    v += kept, left -= kept;
  }
}
#endif

typedef struct {
  across row;
  int64_t most; /* rows of x for which it is faster than "along" */
  int apart;    /* how x must be spread */
} Across;

/* level: 0 AVX2 or no x86, 1 AVX-512, as far as the processor has it. */
static Across choose_across(int level) {
#ifdef X86
  int wide = level > 0 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl");
#ifdef HAS_PAIRED
  if (wide && __builtin_cpu_supports("avx512bf16")) return (Across){across_paired, INT64_MAX, 0};
#endif
  return wide ? (Across){across_wide, 16, 0} : (Across){across_narrow, 12, APART};
#else
  (void)level;
  return (Across){across_plain, 12, APART};
#endif
}

/* Widens `size` entries, a multiple of 16. apart: of every 16 the even ones come first. */
static void spread(const entry *from, float *to, int64_t size, int apart) {
  if (!apart) {
    widen_all(from, to, size);
    return;
  }
  for (int64_t i = 0; i < size; i += 16)
    for (int j = 0; j < 8; j++) to[i + j] = widen(from[i + 2 * j]), to[i + 8 + j] = widen(from[i + 2 * j + 1]);
}

static float dot(const float *a, const float *b, int64_t size) {
  floats one = {0}, two = {0};
  for (int64_t i = 0; i < size; i += 16) one += *(const floats *)(a + i) * *(const floats *)(b + i),
                                         two += *(const floats *)(a + i + 8) * *(const floats *)(b + i + 8);
  one += two;
  return one[0] + one[1] + one[2] + one[3] + (one[4] + one[5] + one[6] + one[7]);
}

/* The sums of eight vectors. */
INLINE floats add_up(const floats *s) {
#ifdef X86
  __m256 a = _mm256_hadd_ps(_mm256_hadd_ps((__m256)s[0], (__m256)s[1]), _mm256_hadd_ps((__m256)s[2], (__m256)s[3]));
  __m256 b = _mm256_hadd_ps(_mm256_hadd_ps((__m256)s[4], (__m256)s[5]), _mm256_hadd_ps((__m256)s[6], (__m256)s[7]));
  return (floats)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
  floats total;
  for (int i = 0; i < 8; i++) total[i] = s[i][0] + s[i][1] + s[i][2] + s[i][3] + (s[i][4] + s[i][5] + s[i][6] + s[i][7]);
  return total;
#endif
}

/* y of eight rows of S or fewer and one row of x. sums: ACROSS apart. factors: B, u: (x A^T) of that row, both in FP32 and
   padded with zeros to `ranks`, a multiple of 8. */
INLINE void finish(const floats *sums, const float *factors, const float *u, int64_t ranks, const entry *bias, entry *y,
                   int64_t size) {
  floats s[8];
  UNROLL for (int i = 0; i < 8; i++) s[i] = i < size ? sums[i * ACROSS] : (floats){0};
  for (int64_t q = 0; q < ranks; q += 8) {
    floats part = *(const floats *)(u + q);
    UNROLL for (int i = 0; i < 8; i++) s[i] += *(const floats *)(factors + i * ranks + q) * part;
  }
  floats total = add_up(s);
  if (bias)
    for (int i = 0; i < size; i++) total[i] += widen(bias[i]);
  if (size == 8)
    UNROLL for (int i = 0; i < 8; i++) y[i] = narrow(total[i]);
  else
    for (int i = 0; i < size; i++) y[i] = narrow(total[i]);
}

/* u: (rows, ranks), zero behind w->rank; one column of it. */
static void low_rank_column(const Weight *w, int64_t q, const Inputs *in, float *u, int64_t ranks, int64_t rows, int apart) {
  float part[512];
  for (int64_t r = 0; r < rows; r++) u[r * ranks + q] = 0;
  for (int64_t k = 0; k < w->ins; k += 512) {
    int64_t size = w->ins - k < 512 ? w->ins - k : 512, even = size / 16 * 16;
    entry last[16] = {0};
    memcpy(last, w->A + q * w->ins + k + even, (size - even) * sizeof(entry));
    spread(w->A + q * w->ins + k, part, even, apart);
    if (even < size) spread(last, part + even, 16, apart);
    for (int64_t r = 0; r < rows; r++) u[r * ranks + q] += dot(part, in->x + r * in->stride + k, (size + 15) / 16 * 16);
  }
}

static int64_t padded(int64_t rank) { return (rank + 7) / 8 * 8; }

/* SHORT rows of S from `top` on, for all rows of x. factors: memory for as many rows of B. */
static void multiply_tile(const Weight *w, const int64_t *starts, int64_t top, const Inputs *in, const float *u,
                          float *factors, entry *y, int64_t rows, across multiply) {
  int64_t bytes = (w->ins + 7) / 8, ranks = padded(w->rank), high = w->outs - top < SHORT ? w->outs - top : SHORT;
  floats sums[SHORT * ACROSS];
  for (int64_t i = 0; i < high && ranks; i++) {
    memset(factors + (i + 1) * ranks - 8, 0, 8 * sizeof(float));
    widen_all(w->B + (top + i) * w->rank, factors + i * ranks, w->rank);
  }
  for (int64_t first = 0; first < rows; first += ACROSS) {
    int64_t few = rows - first < ACROSS ? rows - first : ACROSS;
    Inputs part = {in->x + first * in->stride, in->given + first * in->stride, in->stride};
    for (int64_t i = 0; i < high; i++)
      multiply(w->mask + (top + i) * bytes, w->values + starts[top + i], w->nonzeros - starts[top + i], &part, bytes,
               sums + i * ACROSS, few);
    for (int64_t r = 0; r < few; r++)
      for (int64_t i = 0; i < high; i += 8)
        finish(sums + i * ACROSS + r, factors + i * ranks, u + (first + r) * ranks, ranks,
               w->bias ? w->bias + top + i : NULL, y + (first + r) * w->outs + top + i, high - i < 8 ? high - i : 8);
  }
}

/* Weights with the same x. starts: those of all weights, one after the other. Returns 1 without memory, else 0. */
static int multiply_across(const Weight *weights, int64_t size, const int64_t *starts, const entry *x, entry *const *ys,
                           int64_t rows, Across way, int threads) {
  int64_t ins = weights->ins, stride = (ins + 7) / 8 * 8 + 64, all_ranks = 0, most_ranks = 0, all_tiles = 0;
  stride = (stride + 15) / 16 * 16;
  for (int64_t i = 0; i < size; i++) {
    int64_t ranks = padded(weights[i].rank);
    all_ranks += ranks, most_ranks = ranks > most_ranks ? ranks : most_ranks;
    all_tiles += (weights[i].outs + SHORT - 1) / SHORT;
  }
  int64_t x_bytes = rows * stride * 4, u_bytes = rows * all_ranks * 4, given_bytes = rows * stride * sizeof(entry);
  int64_t part_bytes = lines(SHORT * most_ranks * 4);
  char *memory = borrow(lines(x_bytes) + lines(u_bytes) + lines(given_bytes) + threads * part_bytes), *rest = memory;
  if (!memory) return 1;
  float *wide = take(&rest, x_bytes), *us = take(&rest, u_bytes);
  entry *given = take(&rest, given_bytes);
  for (int64_t r = 0; r < rows; r++) {
    memcpy(given + r * stride, x + r * ins, ins * sizeof(entry));
    memset(given + r * stride + ins, 0, (stride - ins) * sizeof(entry)); /* what is read behind the ends is zero */
  }
  spread(given, wide, rows * stride, way.apart);
  Inputs in = {wide, given, stride};
#pragma omp parallel num_threads(threads)
  {
    float *factors = (float *)(rest + this_thread() * part_bytes);
#pragma omp for schedule(static)
    for (int64_t column = 0; column < all_ranks; column++) {
      const Weight *w = weights;
      float *u = us;
      int64_t q = column;
      for (; q >= padded(w->rank); w++) q -= padded(w->rank), u += rows * padded(w->rank);
      if (q < w->rank) low_rank_column(w, q, &in, u, padded(w->rank), rows, way.apart);
      else for (int64_t r = 0; r < rows; r++) u[r * padded(w->rank) + q] = 0;
    }
#pragma omp for schedule(static)
    for (int64_t number = 0; number < all_tiles; number++) {
      const Weight *w = weights;
      const int64_t *its_starts = starts;
      const float *u = us;
      int64_t tile = number, tiles;
      for (; tile >= (tiles = (w->outs + SHORT - 1) / SHORT); w++)
        tile -= tiles, its_starts += w->outs + 1, u += rows * padded(w->rank);
      multiply_tile(w, its_starts, tile * SHORT, &in, u, factors, ys[w - weights], rows, way.row);
    }
  }
  return give_back(memory), 0;
}
