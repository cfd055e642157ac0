/* One row of S times up to ACROSS rows of x: some columns of S are expanded to dense ones. A row function leaves eight
 * partial sums for each row of x.
 */

enum { ACROSS = 8, AHEAD = 8192 }; /* rows of x; bytes: memory is read while earlier values are multiplied */

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

#if defined(BF16)
static uint8_t picks[256][16]; /* the bytes of the first four set bits' numbers, as the high halves of four in FP32 */
#else
static int32_t picks[256][8] __attribute__((aligned(32))); /* the first four set bits of a byte, twice */
#endif
__attribute__((constructor)) static void make_picks(void) {
#if defined(BF16)
  memset(picks, 128, sizeof picks); /* which gives zero */
#endif
  for (int byte = 0; byte < 256; byte++)
    for (int bit = 0, rank = 0; bit < 8 && rank < 4; bit++) {
      if (!(byte >> bit & 1)) continue;
#if defined(BF16)
      picks[byte][4 * rank + 2] = 2 * bit, picks[byte][4 * rank + 3] = 2 * bit + 1;
#else
      picks[byte][rank] = picks[byte][rank + 4] = bit;
#endif
      rank++;
    }
}

INLINE __m256 eight_values(const entry *v) {
#if defined(BF16)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)v)), 16));
#elif defined(FP16)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)v));
#else
  return _mm256_loadu_ps(v);
#endif
}

#if defined(BF16)
typedef entry picked; /* the type of x that is picked from */
INLINE const picked *row_of(const Inputs *in) { return in->given; }
INLINE __m256 pick_eight(const uint8_t *m, const picked *x) {
  __m128i begin = _mm_loadu_si128((const __m128i *)picks[m[0]]), end = _mm_loadu_si128((const __m128i *)picks[m[1]]);
  __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(begin), end, 1);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)x), both));
}
#else
typedef float picked;
INLINE const picked *row_of(const Inputs *in) { return in->x; }
INLINE __m256 pick_eight(const uint8_t *m, const picked *x) {
  __m256 begin = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), _mm256_loadu_si256((const __m256i *)picks[m[0]]));
  __m256 end = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), _mm256_loadu_si256((const __m256i *)picks[m[1]]));
  return _mm256_blend_ps(begin, end, 0xf0);
}
#endif

/* Eight values that 16 columns keep, four of every eight, times theirs of x. */
INLINE __m256 add_eight(const uint8_t *m, const entry *v, const picked *x, __m256 sum) {
  return _mm256_fmadd_ps(eight_values(v), pick_eight(m, x), sum);
}

/* One row of x and a row of S that keeps four of every eight columns: x is picked, S stays packed. */
static void across_fours(const uint8_t *m, const entry *v, int64_t left, const Inputs *in, int64_t bytes, floats *sums,
                         int rows) {
  __m256 s[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  const picked *x = row_of(in);
  int64_t byte = 0;
  (void)left, (void)rows;
  for (; byte + 7 < bytes; byte += 8) {
    UNROLL for (size_t line = 0; line < sizeof(entry) / 2; line++)
      __builtin_prefetch((const char *)(v + 4 * byte) + AHEAD + line * 64);
    UNROLL for (int i = 0; i < 4; i++) s[i] = add_eight(m + byte + 2 * i, v + 4 * byte + 8 * i, x + 8 * byte + 16 * i, s[i]);
  }
  for (; byte + 1 < bytes; byte += 2) s[0] = add_eight(m + byte, v + 4 * byte, x + 8 * byte, s[0]);
  if (byte < bytes) { /* nothing is read beyond the values */
    const uint8_t last[2] = {m[byte], 0};
    entry values[8] = {0};
    memcpy(values, v + 4 * byte, 4 * sizeof(entry));
    s[1] = add_eight(last, values, x + 8 * byte, s[1]);
  }
  _mm256_storeu_ps((float *)sums, _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
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
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HAS_TILES 1
#endif
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

