/* The panels of `pairs.c` times x by AMX: 16 rows of x, 32 columns and 16 rows of S an instruction. */
#if defined(HAS_PAIRED) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_TILES 1
#define TILED \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,amx-tile,amx-bf16")))

/* Of eight tiles, each 16 rows of 64 bytes; for this thread. */
TILED static void start_tiles(void) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}

TILED static void end_tiles(void) { _tile_release(); }

/* Tiles 0 to 3 += 16 or 32 rows of x times both halves of a panel, over `blocks` of 32 columns. */
TILED INLINE void add_tiles(Panel panel, int64_t blocks, const entry *x, int64_t stride, int both) {
  for (int64_t k = 0; k < blocks; k++) {
    _tile_loadd(6, panel.first + LANES * k, 64);
    _tile_loadd(7, panel.second + LANES * k, 64);
    _tile_loadd(4, x + 32 * k, stride * sizeof(entry));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!both) continue;
    _tile_loadd(5, x + 16 * stride + 32 * k, stride * sizeof(entry));
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

/* As `multiply_rows`. x and u are read, and not used, up to a multiple of 16 rows, and zero up to one of 32 columns. */
TILED static void multiply_rows_tiled(const Task *t, const entry *x, const entry *u, entry *y, int64_t all) {
  float sums[4][LANES * LANES];
  __m512 low = _mm512_loadu_ps(t->bias), high = _mm512_loadu_ps(t->bias + LANES);
  for (int64_t first = 0; first < all; first += 2 * LANES) {
    int64_t rows = all - first < 2 * LANES ? all - first : 2 * LANES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    add_tiles(t->S, (t->ins + 31) / 32, x + first * t->x_stride, t->x_stride, rows > LANES);
    add_tiles(t->B, (t->rank + 31) / 32, u + first * t->u_stride, t->u_stride, rows > LANES);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int64_t r = 0; r < rows; r++) {
      const float *mine = sums[r / LANES * 2] + r % LANES * LANES;
      entry *to = y + (first + r) * t->apart;
      store_narrow(_mm512_add_ps(_mm512_loadu_ps(mine), low), to, t->high);
      if (t->high > LANES)
        store_narrow(_mm512_add_ps(_mm512_loadu_ps(mine + LANES * LANES), high), to + LANES, t->high - LANES);
    }
  }
}
#endif
