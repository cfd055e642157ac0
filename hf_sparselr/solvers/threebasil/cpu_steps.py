"""The elementwise steps of `admm` on the CPU: one pass over memory each, in C.

As torch operators they can take two to three times as long as the product of a step.
"""

import ctypes
import functools

import torch

from ...format.patterns import NM
from ...utils.c_compiler import load

_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#define MOST 32 /* entries of a group, see patterns.MAX_M */
#define SIDE 64

void correction(const float *t, const uint8_t *mask, const float *w, const float *l, float rho, float *z,
                int64_t size, int threads) {
  _Pragma("omp parallel for simd schedule(static) num_threads(threads)")
  for (int64_t i = 0; i < size; i++) z[i] = ((mask[i] ? t[i] : -t[i]) - w[i] + l[i]) * rho;
}

void move(float *t, const uint8_t *mask, const float *w, const float *e, int64_t size, int threads) {
  _Pragma("omp parallel for simd schedule(static) num_threads(threads)")
  for (int64_t i = 0; i < size; i++) t[i] = (mask[i] ? 0.0f : t[i]) + w[i] - e[i];
}

/* Groups lie side by side while they are ranked, so that a comparison is one for many of them. */
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
"""


def available() -> bool:
    """Whether the steps below run here; the first call may compile."""
    return _library() is not None


def correction(
    T: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, L: torch.Tensor, rho: float
) -> torch.Tensor:
    """`admm._correction` of FP32 matrices."""
    Z = torch.empty_like(W)
    pointers = (tensor.data_ptr() for tensor in (T, mask, W, L))
    _library().correction(*pointers, rho, Z.data_ptr(), Z.numel(), torch.get_num_threads())
    return Z


def move(T: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, E: torch.Tensor, pattern: NM | None) -> None:
    """`admm._sparse` of FP32 matrices."""
    pointers = (tensor.data_ptr() for tensor in (T, mask, W, E))
    if pattern is None:
        _library().move(*pointers, T.numel(), torch.get_num_threads())
    else:
        _library().move_groups(*pointers, T.numel(), pattern.n, pattern.m, torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load(
        "steps",
        _SOURCE,
        "layers are solved on the CPU without a compiled step, up to half as fast (%s): install a C compiler with "
        "OpenMP",
    )
    if library is None:
        return None
    pointers, size, number = [ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int
    library.correction.argtypes = [*pointers, ctypes.c_float, ctypes.c_void_p, size, number]
    library.move.argtypes = [*pointers, size, number]
    library.move_groups.argtypes = [*pointers, size, number, number, number]
    for function in (library.correction, library.move, library.move_groups):
        function.restype = None
    return library
