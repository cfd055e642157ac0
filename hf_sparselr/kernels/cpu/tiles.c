/* The panels of `pairs.c` times x by AMX: 16 rows of x, 32 columns and 16 rows of S an instruction. */
#ifdef HAS_TILES
#define TILED __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,amx-tile,amx-bf16")))

/* Sets up this thread's eight tiles of 64 bytes by 16 rows; by `rows` those of x and of sums, 0 to 5. */
TILED static void start_tiles(int64_t rows) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = i < 6 && rows < LANES ? rows : LANES;
  _tile_loadconfig(&config);
}

TILED static void end_tiles(void) { _tile_release(); }

/* Tiles 0 and 1 += rows of x from `a` on times the halves of a panel, over `blocks` of 32 columns; 2 and 3 those from
   `b` on, unless that is NULL. */
TILED INLINE void add_tiles(Panel panel, int64_t blocks, const entry *a, const entry *b, int64_t stride) {
  for (int64_t k = 0; k < blocks; k++) {
    _tile_loadd(6, panel.first + LANES * k, 64);
    _tile_loadd(7, panel.second + LANES * k, 64);
    _tile_loadd(4, a + 32 * k, stride * sizeof(entry));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!b) continue;
    _tile_loadd(5, b + 32 * k, stride * sizeof(entry));
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

/* Sums of both halves of a panel plus bias: `rows` of y. */
TILED INLINE void store_sums(const Task *t, const float *first, const float *second, entry *y, int64_t rows) {
  for (int64_t r = 0; r < rows; r++, y += t->apart) {
    store_narrow(_mm512_add_ps(_mm512_loadu_ps(first + r * LANES), _mm512_loadu_ps(t->bias)), y, t->high);
    if (t->high > LANES)
      store_narrow(_mm512_add_ps(_mm512_loadu_ps(second + r * LANES), _mm512_loadu_ps(t->bias + LANES)), y + LANES,
                   t->high - LANES);
  }
}

/* As `multiply_rows`. Columns of x and u are zero up to a multiple of 32. The last rows may be computed twice, so that
   none are read that are not there: `all` is at least what `start_tiles` was told, or LANES. */
TILED static void multiply_rows_tiled(const Task *t, const entry *x, const entry *u, entry *y, int64_t all) {
  float sums[4][LANES * LANES];
  int64_t rows = all < LANES ? all : LANES, last = all - rows;
  for (int64_t i = 0; i < all; i += 2 * LANES) {
    int64_t a = i < last ? i : last, b = i + LANES < last ? i + LANES : last;
    int both = i + LANES < all;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    add_tiles(t->S, (t->ins + 31) / 32, x + a * t->x_stride, both ? x + b * t->x_stride : NULL, t->x_stride);
    add_tiles(t->B, (t->rank + 31) / 32, u + a * t->u_stride, both ? u + b * t->u_stride : NULL, t->u_stride);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    store_sums(t, sums[0], sums[1], y + a * t->apart, rows);
    if (both) store_sums(t, sums[2], sums[3], y + b * t->apart, rows);
  }
}
#endif
