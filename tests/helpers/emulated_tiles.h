/* AMX for a processor that has none: tiles are arrays. Included before all else, by the compiler's -include. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} EmulatedConfig;

static __thread EmulatedConfig emulated;
static __thread union {
  float sums[16][16];
  uint16_t pairs[16][32];
  uint8_t bytes[16][64];
} emulated_tile[8];

static void emulated_config(const void *config) {
  memcpy(&emulated, config, sizeof emulated);
  memset(emulated_tile, 0, sizeof emulated_tile);
}

static void emulated_zero(int tile) { memset(emulated_tile + tile, 0, sizeof *emulated_tile); }

static void emulated_load(int tile, const void *from, int64_t stride) {
  emulated_zero(tile);
  for (int row = 0; row < emulated.rows[tile]; row++)
    memcpy(emulated_tile[tile].bytes[row], (const char *)from + row * stride, emulated.bytes[tile]);
}

static void emulated_store(int tile, void *to, int64_t stride) {
  for (int row = 0; row < emulated.rows[tile]; row++)
    memcpy((char *)to + row * stride, emulated_tile[tile].bytes[row], emulated.bytes[tile]);
}

static float emulated_float(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

static void emulated_product(int sums, int left, int right) {
  for (int row = 0; row < emulated.rows[sums]; row++)
    for (int column = 0; column < emulated.bytes[sums] / 4; column++)
      for (int k = 0; k < emulated.bytes[left] / 2; k++)
        emulated_tile[sums].sums[row][column] += emulated_float(emulated_tile[left].pairs[row][k]) *
                                                 emulated_float(emulated_tile[right].pairs[k / 2][2 * column + k % 2]);
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_config
#define _tile_release() emulated_config(&(EmulatedConfig){0})
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_zero emulated_zero
#define _tile_dpbf16ps emulated_product
