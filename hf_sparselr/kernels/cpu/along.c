/* Many rows of x: x is transposed, and every kept value is multiplied with that column of `width` rows at once, so that
 * only kept values cost time.
 */

enum { BAND = 64, STEP = 32768, MOST = 256, PART = 128 };
/* BAND: rows of S that are used again while they are in a cache. STEP: bytes of transposed x that are used over and over,
   so that they stay in the nearest cache. MOST: rows of x that are transposed at a time. PART: factors at a time. */

/* sums[width] += values[i] * x[columns[i]][width], for all i. SETS of sums, so that an addition need not wait for the
   last. */
#define ALONG(NAME, TARGET, BYTES, COUNT, SETS)                                                                 \
  TARGET static void NAME(float *sums, const int32_t *columns, const float *values, int64_t size, const float *x) { \
    typedef float vec __attribute__((vector_size(BYTES), aligned(4)));                                          \
    enum { LANES = BYTES / 4 };                                                                                 \
    vec s[SETS][COUNT];                                                                                         \
    UNROLL for (int j = 0; j < COUNT; j++) s[0][j] = *(const vec *)(sums + j * LANES);                          \
    UNROLL for (int set = 1; set < SETS; set++)                                                                 \
      UNROLL for (int j = 0; j < COUNT; j++) s[set][j] = (vec){0};                                              \
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

typedef void (*along)(float *, const int32_t *, const float *, int64_t, const float *);
typedef struct {
  int width;
  along add;
} Lane;

#ifdef X86
ALONG(along_16, , 32, 2, 4)
ALONG(along_24, , 32, 3, 3)
ALONG(along_32, , 32, 4, 2)
ALONG(along_48, , 32, 6, 1)
ALONG(along_64, , 32, 8, 1)
#define AVX512 __attribute__((target("avx512f")))
ALONG(along_wide_16, AVX512, 64, 1, 8)
ALONG(along_wide_32, AVX512, 64, 2, 4)
ALONG(along_wide_48, AVX512, 64, 3, 3)
ALONG(along_wide_64, AVX512, 64, 4, 2)
ALONG(along_wide_96, AVX512, 64, 6, 1)
ALONG(along_wide_128, AVX512, 64, 8, 1)
static const Lane wide_lanes[] = {
    {128, along_wide_128}, {96, along_wide_96}, {64, along_wide_64}, {48, along_wide_48}, {32, along_wide_32}, {16, along_wide_16}, {0, NULL}};
#else
ALONG(along_16, , 16, 4, 2)
ALONG(along_24, , 16, 6, 1)
ALONG(along_32, , 16, 8, 1)
ALONG(along_48, , 16, 12, 1)
ALONG(along_64, , 16, 16, 1)
#endif
static const Lane lanes[] = {{64, along_64}, {48, along_48}, {32, along_32}, {24, along_24}, {16, along_16}, {0, NULL}};

/* The width that takes the fewest instructions: for each kept value one a vector and about 1.5 beside them. */
static Lane choose_along(int level, int64_t rows) {
  const Lane *options = lanes;
  double vector = 8, least = 0;
  (void)level;
#ifdef X86
  if (level > 0 && __builtin_cpu_supports("avx512f")) options = wide_lanes, vector = 16;
#endif
  Lane best = *options;
  for (; options->width; options++) {
    double cost = (rows + options->width - 1) / options->width * (options->width / vector + 1.5);
    if (!least || cost < least) least = cost, best = *options;
  }
  return best;
}

/* What threads write while they multiply a band of S. */
typedef struct {
  float *sums;      /* (chunks, BAND, width) */
  int32_t *columns; /* (BAND, listed) */
  float *values;
} Space;

/* x^T in chunks of `width` rows: (chunks, columns, width), zero where there is no row. */
static void transpose(const entry *x, float *xt, int64_t rows, int64_t ins, int64_t columns, int width) {
#pragma omp for schedule(static)
  for (int64_t k = 0; k < ins; k += 16)
    for (int64_t r = 0; r < (rows + width - 1) / width * width; r++)
      for (int64_t j = k; j < k + 16 && j < ins; j++)
        xt[(r / width * columns + j) * width + r % width] = r < rows ? widen(x[r * ins + j]) : 0;
}

/* Adds `size` factors, in parts of PART, times rows of `from` to the sums of `chunks` chunks, `apart` and `from_apart` numbers
   from one chunk to the next. */
static void add_factors(const entry *factors, int64_t size, const float *from, int64_t from_apart, float *sums,
                        int64_t apart, int64_t chunks, Space space, Lane lane) {
  for (int j = 0; j < PART; j++) space.columns[j] = j * lane.width;
  for (int64_t k = 0; k < size; k += PART) {
    int64_t part = size - k < PART ? size - k : PART;
    const float *wide = in_fp32(factors + k, space.values, part);
    for (int64_t c = 0; c < chunks; c++)
      lane.add(sums + c * apart, space.columns, wide, part, from + c * from_apart + k * lane.width);
  }
}

/* One band of rows of S times `chunks` chunks of transposed x: xt (chunks, all columns, width), ut (chunks, rank, width). */
static void multiply_band(const Weight *w, const int64_t *starts, int64_t rows, int64_t top, const float *xt,
                          const float *ut, int64_t chunks, Space space, const int32_t bits[256][8], Lane lane) {
  int width = lane.width;
  int64_t bytes = (w->ins + 7) / 8, step = STEP / 4 / width / 8, listed = 8 * step + 8; /* step: bytes of the mask */
  int64_t at[BAND], kept[BAND];
  const float *values[BAND];
  const entry *values_of_next = w->values + starts[top + rows] - starts[top];
  memset(space.sums, 0, chunks * BAND * width * sizeof(float));
  for (int64_t i = 0; i < rows; i++) at[i] = starts[top + i];
  for (int64_t byte = 0; byte < bytes; byte += step) {
    int64_t part = bytes - byte < step ? bytes - byte : step;
    for (int64_t i = 0; i < rows; i++) {
      int64_t left = starts[top + i + 1] - at[i];
      const uint8_t *m = w->mask + (top + i) * bytes + byte;
      kept[i] = list_columns(m, part, space.columns + i * listed, bits, width, left);
      values[i] = in_fp32(w->values + at[i], space.values + i * listed, kept[i]);
      at[i] += kept[i];
      for (int64_t ahead = 0; ahead < kept[i]; ahead += 64 / sizeof(entry)) /* for the next band */
        __builtin_prefetch(values_of_next + at[i] - kept[i] + ahead);
    }
    for (int64_t c = 0; c < chunks; c++)
      for (int64_t i = 0; i < rows; i++)
        lane.add(space.sums + (c * BAND + i) * width, space.columns + i * listed, values[i], kept[i],
                 xt + (c * 8 * bytes + 8 * byte) * width);
  }
  for (int64_t i = 0; i < rows && w->rank; i++)
    add_factors(w->B + (top + i) * w->rank, w->rank, ut, w->rank * width, space.sums + i * width, BAND * width, chunks,
                space, lane);
}

/* y of one weight and `rows` rows of transposed x, within a parallel region. ut: memory for x A^T. */
static void multiply_chunks(const Weight *w, const int64_t *starts, const float *xt, float *ut, entry *y, int64_t rows,
                            int64_t columns, Space space, const int32_t bits[256][8], Lane lane) {
  int width = lane.width;
  int64_t chunks = (rows + width - 1) / width;
#pragma omp for schedule(static)
  for (int64_t q = 0; q < w->rank; q++) {
    for (int64_t c = 0; c < chunks; c++) memset(ut + (c * w->rank + q) * width, 0, width * sizeof(float));
    add_factors(w->A + q * w->ins, w->ins, xt, columns * width, ut + q * width, w->rank * width, chunks, space, lane);
  }
#pragma omp for schedule(dynamic)
  for (int64_t top = 0; top < w->outs; top += BAND) {
    int64_t band = w->outs - top < BAND ? w->outs - top : BAND;
    multiply_band(w, starts, band, top, xt, ut, chunks, space, bits, lane);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < band; i++) {
        float sum = space.sums[(r / width * BAND + i) * width + r % width];
        y[r * w->outs + top + i] = narrow(w->bias ? sum + widen(w->bias[top + i]) : sum);
      }
  }
}

/* As `multiply_across`. */
static int multiply_along(const Weight *weights, int64_t size, const int64_t *starts, const entry *x, entry *const *ys,
                          int64_t rows, int level, int threads) {
  int64_t most = rows < MOST ? rows : MOST, ins = weights->ins, columns = (ins + 7) / 8 * 8, ranks = 0;
  Lane lane = choose_along(level, most);
  int width = lane.width;
  int64_t chunks = (most + width - 1) / width, listed = STEP / 4 / width + 8, space = chunks * BAND * width;
  for (int64_t i = 0; i < size; i++) ranks = weights[i].rank > ranks ? weights[i].rank : ranks;
  int64_t xt_bytes = chunks * columns * width * 4, ut_bytes = (chunks * ranks + 1) * width * 4;
  int64_t list_bytes = (threads * BAND * listed + PART) * 4, table_bytes = sizeof(set_bits);
  char *memory = borrow(lines(xt_bytes) + lines(ut_bytes) + lines(threads * space * 4) + 2 * lines(list_bytes) +
                        lines(table_bytes));
  char *rest = memory;
  if (!memory) return 1;
  float *xt = take(&rest, xt_bytes), *ut = take(&rest, ut_bytes), *sums = take(&rest, threads * space * 4);
  float *values = take(&rest, list_bytes);
  int32_t *lists = take(&rest, list_bytes), (*bits)[8] = take(&rest, table_bytes);
  for (int byte = 0; byte < 256; byte++) *(ints *)bits[byte] = *(const ints *)set_bits[byte] * width;
  if (columns > ins)
    for (int64_t c = 0; c < chunks; c++)
      memset(xt + (c * columns + ins) * width, 0, (columns - ins) * width * sizeof(float));
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < rows; first += most) {
    int64_t few = rows - first < most ? rows - first : most;
    const int64_t *its_starts = starts;
    Space mine = {sums + this_thread() * space, lists + this_thread() * BAND * listed,
                  values + this_thread() * BAND * listed};
    transpose(x + first * ins, xt, few, ins, columns, width);
    for (const Weight *w = weights; w < weights + size; its_starts += w++->outs + 1)
      multiply_chunks(w, its_starts, xt, ut, ys[w - weights] + first * w->outs, few, columns, mine, bits, lane);
  }
  return give_back(memory), 0;
}
