/* Panels of S for a processor that multiplies pairs of BF16: 32 rows are unpacked and laid out as the instruction
 * takes them, once for all rows of x. A lane belongs to a row of S, so that sums need no adding up.
 */
#ifdef HAS_PAIRED

enum { LANES = 16, PANEL = 32, CHUNK = 64 };
/* LANES, PANEL: rows of S in a vector and in a panel. CHUNK: rows of x for which x A^T is one task. */

/* Of matrices of up to PANEL rows: for each pair of columns, that of all rows. */
typedef struct {
  __m512i *first, *second; /* of the first and the last LANES rows */
} Panel;

/* Row i of 32-bit entries becomes column i. */
PAIRED INLINE void transpose_pairs(__m512i *r) {
  __m512i a[16], b[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

/* 32 columns of LANES rows of S. at: where the values of each row go on; bytes: of the mask there are; ahead: values
   from here to those of the next LANES rows. */
PAIRED INLINE void expand_block(const uint8_t *m, int64_t stride, const entry *v, int64_t nonzeros, int64_t *at,
                                int64_t high, int64_t bytes, int64_t ahead, __m512i *pairs) {
  __m512i r[LANES];
  UNROLL for (int i = 0; i < LANES; i++) {
    uint32_t bits = 0;
    if (i < high) memcpy(&bits, m + i * stride, bytes);
    int64_t left = nonzeros - at[i];
    __builtin_prefetch(v + at[i] + ahead);
    __m512i values;
    if (left >= 32) values = _mm512_loadu_si512(v + at[i]);
    else values = _mm512_maskz_loadu_epi16(left > 0 ? (1u << left) - 1 : 0, v + at[i]); /* nothing beyond is read */
    r[i] = _mm512_maskz_expand_epi16(bits, values);
    at[i] += __builtin_popcount(bits);
  }
  transpose_pairs(r);
  UNROLL for (int i = 0; i < LANES; i++) pairs[i] = r[i];
}

/* LANES rows of S from `top` on, zero from `high` on. */
PAIRED static void lay_out_sparse(const Weight *w, const int64_t *starts, int64_t top, int64_t high, __m512i *pairs) {
  int64_t bytes = (w->ins + 7) / 8, at[LANES], byte = 0;
  int64_t ahead = starts[top + (high < LANES ? high : LANES)] - starts[top];
  const uint8_t *m = w->mask + top * bytes;
  for (int i = 0; i < LANES; i++) at[i] = i < high ? starts[top + i] : 0;
  for (; high >= LANES && byte + 4 <= bytes; byte += 4)
    expand_block(m + byte, bytes, w->values, w->nonzeros, at, LANES, 4, ahead, pairs + 4 * byte);
  for (; byte < bytes; byte += 4)
    expand_block(m + byte, bytes, w->values, w->nonzeros, at, high, bytes - byte < 4 ? bytes - byte : 4, ahead,
                 pairs + 4 * byte);
}

/* LANES rows of a dense matrix (all, columns). */
PAIRED static void lay_out_dense(const entry *rows, int64_t high, int64_t columns, __m512i *pairs) {
  for (int64_t k = 0; k < columns; k += 32) {
    __m512i r[LANES];
    __mmask32 there = columns - k >= 32 ? ~0u : (1u << (columns - k)) - 1;
    UNROLL for (int i = 0; i < LANES; i++)
      r[i] = _mm512_maskz_loadu_epi16(i < high ? there : 0, rows + (i < high ? i : 0) * columns + k);
    transpose_pairs(r);
    UNROLL for (int i = 0; i < LANES; i++) pairs[k / 2 + i] = r[i];
  }
}

PAIRED INLINE void add_pairs(Panel panel, int64_t pairs, const entry *x, int64_t stride, __m512 (*s)[2],
                             const int rows) {
  for (int64_t p = 0; p < pairs; p++) {
    __m512bh first = (__m512bh)panel.first[p], second = (__m512bh)panel.second[p];
    UNROLL for (int r = 0; r < rows; r++) {
      int32_t pair;
      memcpy(&pair, x + r * stride + 2 * p, 4);
      __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      s[r][0] = _mm512_dpbf16_ps(s[r][0], first, both), s[r][1] = _mm512_dpbf16_ps(s[r][1], second, both);
    }
  }
}

/* As `narrow`. */
PAIRED INLINE void store_narrow(__m512 sums, entry *y, int64_t size) {
  __m512i bits = _mm512_castps_si512(sums), one = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(one, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q), there = size >= LANES ? 0xffff : (1u << size) - 1;
  rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(64));
  _mm256_mask_storeu_epi16(y, there, _mm512_cvtepi32_epi16(rounded));
}

/* One panel times some rows of x, and of u: y (rows, apart), of which `high` columns are the panel's. */
typedef struct {
  Panel S, B;
  int64_t ins, rank, x_stride, u_stride, apart, high;
  float bias[PANEL];
} Task;

PAIRED INLINE void multiply_panel(const Task *t, const entry *x, const entry *u, entry *y, const int rows) {
  __m512 s[ACROSS][2];
  UNROLL for (int r = 0; r < rows; r++) s[r][0] = _mm512_loadu_ps(t->bias), s[r][1] = _mm512_loadu_ps(t->bias + LANES);
  add_pairs(t->S, (t->ins + 1) / 2, x, t->x_stride, s, rows);
  add_pairs(t->B, (t->rank + 1) / 2, u, t->u_stride, s, rows);
  UNROLL for (int r = 0; r < rows; r++) {
    store_narrow(s[r][0], y + r * t->apart, t->high);
    if (t->high > LANES) store_narrow(s[r][1], y + r * t->apart + LANES, t->high - LANES);
  }
}

/* Rows in parts of equal size, up to ACROSS. */
PAIRED static void multiply_rows(const Task *t, const entry *x, const entry *u, entry *y, int64_t all) {
  int64_t parts = (all + ACROSS - 1) / ACROSS;
  for (int64_t part = 0, next; part < parts; part++) {
    int64_t first = all * part / parts;
    next = all * (part + 1) / parts;
    int rows = next - first;
#define CALL(ROWS) multiply_panel(t, x + first * t->x_stride, u + first * t->u_stride, y + first * t->apart, ROWS)
    EACH(CALL)
#undef CALL
  }
}
#endif
