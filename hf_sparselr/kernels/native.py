"""x S^T for one row of x on the CPU: a few lines of C, compiled on first use, as no torch operator reads S packed.

With AVX-512 (VBMI2) the mask expands the next values to 16 columns in one instruction; with AVX2 a byte of it picks
their places among eight columns from a table. Without AVX2 or a C compiler the reference takes over, which unpacks S
for each call: slower than a dense layer.
"""

import ctypes
import functools
import logging

import torch

from ..c_library import load

logger = logging.getLogger(__name__)

_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")

_SOURCE = r"""
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#define AHEAD 4096 /* bytes: memory is read while earlier values are multiplied */
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))

static __m256 read_f32(const float *v) { return _mm256_loadu_ps(v); }
static __m256 read_f16(const uint16_t *v) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)v)); }
static __m256 read_bf16(const uint16_t *v) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)v));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

/* The next values at the set bits of 16 columns, zero elsewhere. */
WIDE static __m512 expand_f32(__mmask16 bits, const float *v) { return _mm512_maskz_expandloadu_ps(bits, v); }
WIDE static __m512 expand_f16(__mmask16 bits, const uint16_t *v) {
  return _mm512_cvtph_ps(_mm256_maskz_expandloadu_epi16(bits, v));
}
WIDE static __m512 expand_bf16(__mmask16 bits, const uint16_t *v) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_expandloadu_epi16(bits, v));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* One row of S times x. left: how many values there are from v on. places: for each byte of the mask the rank of
   each column's value, -1 where there is none. x holds eight columns more than the mask. */
#define MULTIPLY(KIND, TYPE)                                                                              \
  static __m256 step_##KIND(__m256 sum, uint8_t bits, const TYPE *v, const float *x, const int32_t *places) { \
    __m256i place = _mm256_loadu_si256((const __m256i *)(places + 8 * bits));                             \
    __m256 entries = _mm256_permutevar8x32_ps(read_##KIND(v), place);                                     \
    entries = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), entries);               \
    return _mm256_fmadd_ps(entries, _mm256_loadu_ps(x), sum);                                             \
  }                                                                                                       \
  static float narrow_##KIND(const uint8_t *m, const TYPE *v, int64_t left, const float *x,               \
                             const int32_t *places, int64_t stride) {                                     \
    int64_t byte = 0;                                                                                     \
    float lanes[8], total = 0;                                                                            \
    __m256 even = _mm256_setzero_ps(), odd = even;                                                        \
    for (; byte + 1 < stride && left >= 16; byte += 2) {                                                  \
      __builtin_prefetch((const char *)v + AHEAD);                                                        \
      int first = __builtin_popcount(m[byte]), both = first + __builtin_popcount(m[byte + 1]);            \
      even = step_##KIND(even, m[byte], v, x + 8 * byte, places);                                         \
      odd = step_##KIND(odd, m[byte + 1], v + first, x + 8 * byte + 8, places);                           \
      v += both, left -= both;                                                                            \
    }                                                                                                     \
    for (; byte < stride; byte++) {                                                                       \
      TYPE last[8] = {0}; /* nothing is read beyond the values */                                         \
      int count = __builtin_popcount(m[byte]);                                                            \
      for (int i = 0; i < count; i++) last[i] = v[i];                                                     \
      even = step_##KIND(even, m[byte], last, x + 8 * byte, places);                                      \
      v += count;                                                                                         \
    }                                                                                                     \
    _mm256_storeu_ps(lanes, _mm256_add_ps(even, odd));                                                    \
    for (int i = 0; i < 8; i++) total += lanes[i];                                                        \
    return total;                                                                                         \
  }                                                                                                       \
  WIDE static float wide_##KIND(const uint8_t *m, const TYPE *v, int64_t left, const float *x,            \
                                const int32_t *places, int64_t stride) {                                  \
    int64_t byte = 0;                                                                                     \
    __m512 even = _mm512_setzero_ps(), odd = even;                                                        \
    for (; byte + 3 < stride; byte += 4) {                                                                \
      uint32_t bits = m[byte] | m[byte + 1] << 8 | m[byte + 2] << 16 | (uint32_t)m[byte + 3] << 24;       \
      int first = __builtin_popcount(bits & 0xffff);                                                      \
      __builtin_prefetch((const char *)v + AHEAD);                                                        \
      even = _mm512_fmadd_ps(expand_##KIND(bits, v), _mm512_loadu_ps(x + 8 * byte), even);                \
      odd = _mm512_fmadd_ps(expand_##KIND(bits >> 16, v + first), _mm512_loadu_ps(x + 8 * byte + 16), odd); \
      v += __builtin_popcount(bits);                                                                      \
    }                                                                                                     \
    for (; byte < stride; byte++) {                                                                       \
      even = _mm512_fmadd_ps(expand_##KIND(m[byte], v), _mm512_loadu_ps(x + 8 * byte), even);             \
      v += __builtin_popcount(m[byte]);                                                                   \
    }                                                                                                     \
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));                                                \
  }                                                                                                       \
  int multiply_##KIND(const uint8_t *mask, const TYPE *values, const int64_t *starts, const TYPE *inputs,  \
                      float *y, const int32_t *places, int64_t outs, int64_t ins, int threads) {          \
    int64_t stride = (ins + 7) / 8, padded = 8 * stride + 8;                                              \
    float *x = calloc(padded, sizeof(float));                                                             \
    if (!x) return 0;                                                                                     \
    for (int64_t i = 0; i + 8 <= ins; i += 8) _mm256_storeu_ps(x + i, read_##KIND(inputs + i));           \
    TYPE last[8] = {0};                                                                                   \
    for (int64_t i = ins / 8 * 8; i < ins; i++) last[i % 8] = inputs[i];                                  \
    if (ins % 8) _mm256_storeu_ps(x + ins / 8 * 8, read_##KIND(last));                                    \
    int wide = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl");               \
    _Pragma("omp parallel for schedule(static) num_threads(threads)")                                     \
    for (int64_t row = 0; row < outs; row++)                                                              \
      y[row] = (wide ? wide_##KIND : narrow_##KIND)(mask + row * stride, values + starts[row],            \
                                                    starts[outs] - starts[row], x, places, stride);       \
    free(x);                                                                                              \
    return 1;                                                                                             \
  }

MULTIPLY(f32, float)
MULTIPLY(f16, uint16_t)
MULTIPLY(bf16, uint16_t)
"""


def supports(dtype: torch.dtype) -> bool:
    """Whether `multiply` runs here for values of this dtype; the first call may compile."""
    return dtype in _KINDS and _library() is not None


def multiply(
    inputs: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """x S^T, summed in FP32.

    Args:
        inputs: x (in,), FP32, BF16 or FP16, the dtype of the values.
        mask: the packed mask, uint8 (out, ceil(in / 8)); `values`: (nonzeros,).
        starts: int64 (out + 1,): the first value of each row, and the end.

    Returns:
        (out,), the dtype of the inputs.
    """
    inputs, mask, values = inputs.contiguous(), mask.contiguous(), values.contiguous()
    y = torch.empty(len(mask))
    done = getattr(_library(), f"multiply_{_KINDS[values.dtype]}")(
        mask.data_ptr(), values.data_ptr(), starts.data_ptr(), inputs.data_ptr(), y.data_ptr(), _places().data_ptr(),
        len(mask), len(inputs), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for {len(inputs)} inputs")
    return y.to(inputs.dtype)


@functools.cache
def _places() -> torch.Tensor:
    """int32 (256, 8): the rank of each set bit among those of its byte, -1 for the others."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return torch.where(bits == 1, bits.cumsum(1) - 1, -1).to(torch.int32)


@functools.cache
def _library() -> ctypes.CDLL | None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        logger.warning(
            "packed layers run several times slower than dense ones on a CPU without AVX2; load with kernel='dense'"
        )
        return None
    library = load(
        "packed",
        _SOURCE,
        "packed layers run on the CPU without their compiled kernel, several times slower than dense ones (%s): "
        "install a C compiler with OpenMP, or load with kernel='dense'",
        _FLAGS,
    )
    for kind in _KINDS.values() if library else ():
        pointers, numbers = [ctypes.c_void_p] * 6, [ctypes.c_int64] * 2
        function = getattr(library, f"multiply_{kind}")
        function.argtypes, function.restype = [*pointers, *numbers, ctypes.c_int], ctypes.c_int
    return library
