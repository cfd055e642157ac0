/* The product for few rows of x, by a row function of `across.c`, to whose sums `finish` adds the factors.
 *
 * Where a mask keeps four of every eight columns, as 2:4 does, the rows' values lie at known places, and the mask is
 * checked on the way. Else they were counted before.
 */

#ifdef HAS_TILES
enum { BEFORE_TILES = 5 }; /* rows of x, with AMX */
#else
enum { BEFORE_TILES = 16 };
#endif
enum { SHORT = 16 }; /* rows of S that are used again while they are in a cache */

typedef struct {
  across row;
  int64_t most; /* rows of x for which it is faster than what is for many */
  int apart;    /* how x must be spread */
} Across;

/* level: 0 AVX2 or no x86, 1 AVX-512, 2 AMX, as far as the processor has it. fours: for one row of x and four of every eight
   columns. */
static Across choose_across(int level, int fours) {
#ifdef X86
  int wide = level > 0 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl");
#ifdef HAS_PAIRED
  if (wide && __builtin_cpu_supports("avx512bf16")) return (Across){across_paired, level > 1 ? BEFORE_TILES : 16, 0};
#endif
  if (!wide && fours) return (Across){across_fours, 1, 0};
  return wide ? (Across){across_wide, 16, 0} : (Across){across_narrow, 12, APART};
#else
  (void)level, (void)fours;
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

/* Eight factors in FP32. */
INLINE floats eight_factors(const entry *factors) {
#ifdef X86
  return (floats)eight_values(factors);
#else
  floats wide;
  for (int i = 0; i < 8; i++) wide[i] = widen(factors[i]);
  return wide;
#endif
}

/* y of eight rows of S or fewer and one row of x. sums: ACROSS apart. u: (x A^T) of that row in FP32, padded with zeros to
   `ranks`, a multiple of 8. B: likewise, in FP32 in `factors`, or as it is if that is NULL. */
INLINE void finish(const floats *sums, const entry *B, const float *factors, const float *u, int64_t ranks,
                   const entry *bias, entry *y, int64_t size) {
  floats s[8];
  UNROLL for (int i = 0; i < 8; i++) s[i] = i < size ? sums[i * ACROSS] : (floats){0};
  for (int64_t q = 0; q < ranks; q += 8) {
    floats part = *(const floats *)(u + q);
    UNROLL for (int i = 0; i < 8; i++)
      s[i] += (factors ? *(const floats *)(factors + i * ranks + q) : eight_factors(B + (i < size ? i : 0) * ranks + q)) * part;
  }
  floats total = add_up(s);
  if (bias)
    for (int i = 0; i < size; i++) total[i] += widen(bias[i]);
  if (size == 8) narrow_eight(total, y);
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

static int64_t padded(int64_t rank) { return up_to(rank, 8); }

/* Whether every byte has four bits. */
static int keeps_fours(const uint8_t *m, int64_t bytes) {
  uint8_t others = 0;
  int64_t i = 0;
#ifdef X86
  const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                          2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15), four = _mm256_set1_epi8(4);
  __m256i wrong = _mm256_setzero_si256();
  for (; i + 32 <= bytes; i += 32) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)(m + i));
    __m256i first = _mm256_shuffle_epi8(counts, _mm256_and_si256(bits, low));
    __m256i second = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(bits, 4), low));
    wrong = _mm256_or_si256(wrong, _mm256_xor_si256(_mm256_add_epi8(first, second), four));
  }
  others = !_mm256_testz_si256(wrong, wrong);
#endif
  for (; i < bytes; i++) {
    uint8_t pairs = m[i] - (m[i] >> 1 & 0x55), nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33);
    others |= ((nibbles + (nibbles >> 4)) & 15) ^ 4;
  }
  return !others;
}

/* Whether a mask seems to keep four of every eight columns. */
static int may_keep_fours(const Weight *w) {
  return w->ins % 8 == 0 && 2 * w->nonzeros == w->outs * w->ins && keeps_fours(w->mask, w->outs ? w->ins / 8 : 0);
}

/* SHORT rows of S from `top` on, for all rows of x. factors: memory for as many rows of B. starts: NULL where four of
   every eight columns are kept. */
static void multiply_tile(const Weight *w, const int64_t *starts, int64_t top, const Inputs *in, const float *u,
                          float *factors, entry *y, int64_t rows, across multiply) {
  int64_t bytes = (w->ins + 7) / 8, ranks = padded(w->rank), high = w->outs - top < SHORT ? w->outs - top : SHORT;
  floats sums[SHORT * ACROSS];
  int wide = rows > 1 || ranks != w->rank; /* for one row of x they are used once */
  for (int64_t i = 0; i < high && ranks && wide; i++) {
    memset(factors + (i + 1) * ranks - 8, 0, 8 * sizeof(float));
    widen_all(w->B + (top + i) * w->rank, factors + i * ranks, w->rank);
  }
  for (int64_t first = 0; first < rows; first += ACROSS) {
    int64_t few = rows - first < ACROSS ? rows - first : ACROSS;
    Inputs part = {in->x + first * in->stride, in->given + first * in->stride, in->stride};
    for (int64_t i = 0; i < high; i++) {
      int64_t start = starts ? starts[top + i] : 4 * bytes * (top + i);
      multiply(w->mask + (top + i) * bytes, w->values + start, w->nonzeros - start, &part, bytes, sums + i * ACROSS, few);
    }
    for (int64_t r = 0; r < few; r++)
      for (int64_t i = 0; i < high; i += 8)
        finish(sums + i * ACROSS + r, w->B + (top + i) * w->rank, wide ? factors + i * ranks : NULL,
               u + (first + r) * ranks, ranks, w->bias ? w->bias + top + i : NULL,
               y + (first + r) * w->outs + top + i, high - i < 8 ? high - i : 8);
  }
}

/* Weights with the same x. starts: those of all weights, one after the other, or NULL, see `multiply_tile`. Returns 1
   without memory, 2 if the masks keep other columns than they seem to without `starts`, else 0. */
static int multiply_across(const Weight *weights, int64_t size, const int64_t *starts, const entry *x, entry *const *ys,
                           int64_t rows, Across way, int threads) {
  int64_t ins = weights->ins, stride = up_to(up_to(ins, 8) + 64, 16), all_ranks = 0, most_ranks = 0, all_tiles = 0;
  for (int64_t i = 0; i < size; i++) {
    int64_t ranks = padded(weights[i].rank);
    all_ranks += ranks, most_ranks = ranks > most_ranks ? ranks : most_ranks;
    all_tiles += up_to(weights[i].outs, SHORT) / SHORT;
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
  int others = 0;
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
      Tile t = find_tile(weights, starts, number, SHORT, rows, 8);
      int64_t high = t.w->outs - t.top < SHORT ? t.w->outs - t.top : SHORT;
      multiply_tile(t.w, t.starts, t.top, &in, us + t.u, factors, ys[t.w - weights], rows, way.row);
      if (!starts && !keeps_fours(t.w->mask + t.top * (ins / 8), high * (ins / 8))) {
#pragma omp atomic write
        others = 1;
      }
    }
  }
  return give_back(memory), others ? 2 : 0;
}
