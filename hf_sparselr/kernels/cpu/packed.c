/* y = x S^T + (x A^T) B^T + bias from the packed S, and S in full. Sums are in FP32, results are rounded once.
 *
 * Compiled once for each type of the values: -DBF16, -DFP16 or neither (FP32). x86-64 with AVX2, or any other processor
 * by the compiler's own vectors.
 *
 * Nothing is read beyond a weight's `nonzeros` values or beyond a row of the mask, whatever the mask holds: the values of
 * each row are counted in the mask first, and every loop over values ends where its row's, or the last row's, end.
 */

/* Counts the values of all weights. Returns 0, or 3 + the number of the first whose mask keeps not `nonzeros` but *kept. */
static int count_all(const Weight *weights, int64_t size, int64_t *starts, int threads, int64_t *kept) {
  for (int64_t i = 0; i < size; starts += weights[i++].outs + 1) {
    *kept = count(weights + i, starts, threads);
    if (*kept != weights[i].nonzeros) return 3 + i;
  }
  return 0;
}

/* The products of `size` weights of one width with x (rows, ins): ys[i] (rows, outs of weight i), rows after each other.
   level: see choose_across. Returns 0; 1: no memory; from 3 on: see count_all. */
int multiply(const Weight *weights, int64_t size, const entry *x, entry *const *ys, int64_t rows, int level,
             int threads, int64_t *kept) {
  int64_t all = 0;
  int fours = 1;
  for (int64_t i = 0; i < size; i++) all += weights[i].outs + 1, fours = fours && may_keep_fours(weights + i);
  Across few_rows = choose_across(level, 0);
  if (fours && rows <= few_rows.most) {
    int failed = multiply_across(weights, size, NULL, x, ys, rows, choose_across(level, rows == 1), threads);
    if (failed != 2) return failed;
  }
  int64_t local[2048], *starts = all <= 2048 ? local : malloc(all * 8);
  if (!starts) return 1;
  int failed = count_all(weights, size, starts, threads, kept);
  if (!failed && rows <= few_rows.most) failed = multiply_across(weights, size, starts, x, ys, rows, few_rows, threads);
#ifdef HAS_PAIRED
  else if (!failed && few_rows.row == across_paired)
    failed = multiply_panels(weights, size, starts, x, ys, rows, level, threads);
#endif
  else if (!failed) failed = multiply_along(weights, size, starts, x, ys, rows, level, threads);
  if (starts != local) free(starts);
  return failed;
}

/* Whether many rows of BF16 are multiplied by the fastest instructions there are. */
int has_panels(int level) {
#ifdef HAS_TILES
  return choose_across(level, 0).row == across_paired;
#elif defined(HAS_PAIRED)
  return level < 2 && choose_across(level, 0).row == across_paired;
#else
  return (void)level, 0;
#endif
}

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

/* dense: S (outs, ins). Returns as `multiply`. */
int unpack(const Weight *w, entry *dense, int level, int threads, int64_t *kept) {
  int64_t *starts = malloc((w->outs + 1) * 8), stride = (w->ins + 7) / 8;
  if (!starts) return 1;
  int failed = count_all(w, 1, starts, threads, kept);
  if (failed) return free(starts), failed;
#ifdef X86
  int wide = level > 0 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl");
#else
  (void)level;
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < w->outs; row++) {
    const uint8_t *m = w->mask + row * stride;
    int64_t left = w->nonzeros - starts[row];
#ifdef X86
    if (wide) {
      wide_unpack(m, w->values + starts[row], left, dense + row * w->ins, w->ins);
      continue;
    }
#endif
    plain_unpack(m, w->values + starts[row], left, dense + row * w->ins, 0, w->ins);
  }
  return free(starts), 0;
}
