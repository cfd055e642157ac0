/* Many rows of x in BF16, by panels of S: each is laid out once, then multiplied by `pairs.c`, or with AMX by `tiles.c`.
 */
#ifdef HAS_PAIRED

/* multiply: a panel by rows of x. unit: x and u have zeros up to a multiple of so many columns. */
typedef struct {
  void (*multiply)(const Task *, const entry *, const entry *, entry *, int64_t);
  int64_t unit;
} Way;

/* u (rows, stride) = x A^T of some rows. */
static void low_rank_rows(const Weight *w, Way way, Panel space, const entry *x, int64_t x_stride, entry *u,
                          int64_t rows) {
  int64_t stride = up_to(w->rank, way.unit);
  memset(u, 0, rows * stride * sizeof(entry));
  for (int64_t q = 0; q < w->rank; q += PANEL) {
    int64_t high = w->rank - q < PANEL ? w->rank - q : PANEL;
    Task task = {space, space, w->ins, 0, x_stride, stride, stride, high, {0}};
    lay_out_dense(w->A + q * w->ins, high, w->ins, space.first);
    if (high > LANES) lay_out_dense(w->A + (q + LANES) * w->ins, high - LANES, w->ins, space.second);
    way.multiply(&task, x, u, u + q, rows);
  }
}

/* PANEL rows of S from `top` on, for all rows of x. */
static void multiply_one_panel(const Weight *w, Way way, const int64_t *starts, int64_t top, Panel S, Panel B,
                               const entry *x, int64_t x_stride, const entry *u, entry *y, int64_t rows) {
  int64_t high = w->outs - top < PANEL ? w->outs - top : PANEL;
  Task task = {S, B, w->ins, w->rank, x_stride, up_to(w->rank, way.unit), w->outs, high, {0}};
  for (int64_t i = 0; i < high && w->bias; i++) task.bias[i] = widen(w->bias[top + i]);
  lay_out_sparse(w, starts, top, high, S.first);
  lay_out_dense(w->B + top * w->rank, high, w->rank, B.first);
  if (high > LANES) { /* else the second vectors' sums, of whatever is there, are dropped */
    lay_out_sparse(w, starts, top + LANES, high - LANES, S.second);
    lay_out_dense(w->B + (top + LANES) * w->rank, high - LANES, w->rank, B.second);
  }
  way.multiply(&task, x, u, y + top, rows);
}

/* As `multiply_across`; x A^T is rounded to BF16. level: see `choose_across`. */
static int multiply_panels(const Weight *weights, int64_t size, const int64_t *starts, const entry *x, entry *const *ys,
                           int64_t rows, int level, int threads) {
  Way way = {multiply_rows, 2};
#ifdef HAS_TILES
  if (level > 1) way = (Way){multiply_rows_tiled, 32};
#else
  (void)level;
#endif
  int64_t ins = weights->ins, x_stride = up_to(ins, way.unit), most = 0, all = 0, panels = 0;
  for (int64_t i = 0; i < size; i++) {
    most = weights[i].rank > most ? weights[i].rank : most, all += up_to(weights[i].rank, way.unit);
    panels += up_to(weights[i].outs, PANEL) / PANEL;
  }
  int64_t x_bytes = x_stride > ins ? rows * x_stride * sizeof(entry) : 0, u_bytes = (rows * all + 1) * sizeof(entry);
  int64_t S_bytes = up_to(ins, 32) * 32, B_bytes = up_to(most, 32) * 32, own = 2 * (S_bytes + B_bytes);
  char *memory = borrow(lines(x_bytes) + lines(u_bytes) + threads * own), *rest = memory;
  if (!memory) return 1;
  entry *copy = take(&rest, x_bytes), *us = take(&rest, u_bytes);
  for (int64_t r = 0; r < rows && x_bytes; r++) {
    memcpy(copy + r * x_stride, x + r * ins, ins * sizeof(entry));
    memset(copy + r * x_stride + ins, 0, (x_stride - ins) * sizeof(entry));
  }
  if (x_bytes) x = copy;
#pragma omp parallel num_threads(threads)
  {
    char *mine = rest + this_thread() * own;
    Panel S = {(__m512i *)mine, (__m512i *)(mine + S_bytes)};
    Panel B = {(__m512i *)(mine + 2 * S_bytes), (__m512i *)(mine + 2 * S_bytes + B_bytes)};
    int64_t parts = (rows + CHUNK - 1) / CHUNK;
#ifdef HAS_TILES
    if (level > 1) start_tiles(rows);
#endif
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < size * parts; number++) {
      int64_t i = number / parts, first = rows * (number % parts) / parts, next = rows * (number % parts + 1) / parts;
      entry *u = us + first * up_to(weights[i].rank, way.unit);
      for (int64_t j = 0; j < i; j++) u += rows * up_to(weights[j].rank, way.unit);
      low_rank_rows(weights + i, way, S, x + first * x_stride, x_stride, u, next - first);
    }
#pragma omp for schedule(dynamic)
    for (int64_t number = 0; number < panels; number++) {
      Tile t = find_tile(weights, starts, number, PANEL, rows, way.unit);
      multiply_one_panel(t.w, way, t.starts, t.top, S, B, x, x_stride, us + t.u, ys[t.w - weights], rows);
    }
#ifdef HAS_TILES
    if (level > 1) end_tiles();
#endif
  }
  return give_back(memory), 0;
}
#endif
