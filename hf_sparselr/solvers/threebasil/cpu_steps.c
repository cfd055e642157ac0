/* The elementwise steps of admm.py, each in one pass over memory. All matrices are contiguous FP32, masks bytes 0 or 1;
   the results are those of the torch functions of admm.py, to the bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MOST 32 /* largest M of a pattern N:M, see format/patterns.py */
#define SIDE 64 /* groups that are ranked side by side */

/* z = ((mask ? t : -t) - w + l) * rho */
void correction(const float *t, const uint8_t *mask, const float *w, const float *l, float rho, float *z,
                int64_t size, int threads) {
  _Pragma("omp parallel for simd schedule(static) num_threads(threads)")
  for (int64_t i = 0; i < size; i++) z[i] = ((mask[i] ? t[i] : -t[i]) - w[i] + l[i]) * rho;
}

/* t = (mask ? 0 : t) + w - e */
void move(float *t, const uint8_t *mask, const float *w, const float *e, int64_t size, int threads) {
  _Pragma("omp parallel for simd schedule(static) num_threads(threads)")
  for (int64_t i = 0; i < size; i++) t[i] = (mask[i] ? 0.0f : t[i]) + w[i] - e[i];
}

/* Marks the n largest of every group of m. Entry j of all groups is one array, so that one vector instruction compares
   many groups. */
static void rank_groups(const float *t, uint8_t *mask, int64_t groups, int n, int m) {
  float size[MOST][SIDE];
  int32_t rank[MOST][SIDE];
  if (groups < SIDE) memset(size, 0, sizeof size), memset(rank, 0, sizeof rank);
  for (int64_t g = 0; g < groups; g++)
    for (int j = 0; j < m; j++) size[j][g] = fabsf(t[g * m + j]), rank[j][g] = 0;
  for (int j = 1; j < m; j++)
    for (int i = 0; i < j; i++)
      for (int g = 0; g < SIDE; g++) {
        int32_t first = size[i][g] >= size[j][g]; /* ties go to the lower index */
        rank[j][g] += first;
        rank[i][g] += 1 - first;
      }
  for (int64_t g = 0; g < groups; g++)
    for (int j = 0; j < m; j++) mask[g * m + j] = rank[j][g] < n;
}

/* `move`, and mask = the n largest of every group of m neighbours; size is divisible by m. */
void move_groups(float *t, uint8_t *mask, const float *w, const float *e, int64_t size, int n, int m, int threads) {
  int64_t side = (int64_t)SIDE * m;
  _Pragma("omp parallel for schedule(static) num_threads(threads)")
  for (int64_t first = 0; first < size; first += side) {
    int64_t count = size - first < side ? size - first : side;
    for (int64_t i = first; i < first + count; i++) t[i] = (mask[i] ? 0.0f : t[i]) + w[i] - e[i];
    if (m == 4) rank_groups(t + first, mask + first, count / 4, n, 4);
    else rank_groups(t + first, mask + first, count / m, n, m);
  }
}
