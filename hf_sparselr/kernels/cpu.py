"""x S^T + (x A^T) B^T + bias for one row of x on the CPU, and S in full for more: a few lines of C, compiled on first
use, as no torch operator reads S packed.

With AVX-512 (VBMI2) the mask expands the next values to 16 columns in one instruction, or to 32 where pairs of BF16
are multiplied as they are (AVX512_BF16); with AVX2 a byte of it picks their places among eight columns from a table.
Without AVX2 or a C compiler S is unpacked by torch for each call, several times slower than a dense layer.
"""

import ctypes
import functools
import logging

import torch

from ..utils.c_compiler import load

logger = logging.getLogger(__name__)

_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")

_SOURCE = r"""
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define AHEAD 4096 /* bytes: memory is read while earlier values are multiplied */
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))
#define PAIRED __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16")))

static __m256 read_f32(const float *v) { return _mm256_loadu_ps(v); }
static __m256 read_f16(const uint16_t *v) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)v)); }
static __m256 read_bf16(const uint16_t *v) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)v));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

/* The next values at the set bits of 16 columns, zero elsewhere. 16 are read, wanted or not. */
WIDE static __m512 expand_f32(__mmask16 bits, const float *v) {
  return _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(v));
}
WIDE static __m512 expand_f16(__mmask16 bits, const uint16_t *v) {
  return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(bits, _mm256_loadu_si256((const __m256i *)v)));
}
WIDE static __m512 expand_bf16(__mmask16 bits, const uint16_t *v) {
  __m256i entries = _mm256_maskz_expand_epi16(bits, _mm256_loadu_si256((const __m256i *)v));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(entries), 16));
}

static float scalar_f32(float value) { return value; }
static float scalar_f16(uint16_t value) { return _cvtsh_ss(value); }
static float scalar_bf16(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
static float store_f32(float value) { return value; }
static uint16_t store_f16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
static uint16_t store_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return bits >> 16 | 64; /* NaN stays NaN */
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* One row of S times x. left: how many values there are from v on. given: x as it came; both have room for 32 columns
   more. places: for each byte of the mask the rank of each column's value, -1 where there is none. */
#define ROW(TYPE)                                                                                               \
  const uint8_t *m, const TYPE *v, int64_t left, const float *x, const TYPE *given, const int32_t *places,      \
      int64_t stride
#define ROWS(KIND, TYPE)                                                                                        \
  typedef float (*row_##KIND)(ROW(TYPE));                                                                       \
  static __m256 step_##KIND(__m256 sum, uint8_t bits, const TYPE *v, const float *x, const int32_t *places) {   \
    __m256i place = _mm256_loadu_si256((const __m256i *)(places + 8 * bits));                                   \
    __m256 entries = _mm256_permutevar8x32_ps(read_##KIND(v), place);                                           \
    entries = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), entries);                     \
    return _mm256_fmadd_ps(entries, _mm256_loadu_ps(x), sum);                                                   \
  }                                                                                                             \
  static float narrow_##KIND(ROW(TYPE)) {                                                                       \
    int64_t byte = 0;                                                                                           \
    float lanes[8], total = 0;                                                                                  \
    __m256 even = _mm256_setzero_ps(), odd = even;                                                              \
    for (; byte + 1 < stride && left >= 16; byte += 2) {                                                        \
      __builtin_prefetch((const char *)v + AHEAD);                                                              \
      int first = __builtin_popcount(m[byte]), both = first + __builtin_popcount(m[byte + 1]);                  \
      even = step_##KIND(even, m[byte], v, x + 8 * byte, places);                                               \
      odd = step_##KIND(odd, m[byte + 1], v + first, x + 8 * byte + 8, places);                                 \
      v += both, left -= both;                                                                                  \
    }                                                                                                           \
    for (; byte < stride; byte++) {                                                                             \
      TYPE last[8] = {0}; /* nothing is read beyond the values */                                               \
      int count = __builtin_popcount(m[byte]);                                                                  \
      for (int i = 0; i < count; i++) last[i] = v[i];                                                           \
      even = step_##KIND(even, m[byte], last, x + 8 * byte, places);                                            \
      v += count;                                                                                               \
    }                                                                                                           \
    _mm256_storeu_ps(lanes, _mm256_add_ps(even, odd));                                                          \
    for (int i = 0; i < 8; i++) total += lanes[i];                                                              \
    return total;                                                                                               \
  }                                                                                                             \
  WIDE static float wide_##KIND(ROW(TYPE)) {                                                                    \
    int64_t byte = 0;                                                                                           \
    __m512 even = _mm512_setzero_ps(), odd = even;                                                              \
    for (; byte + 3 < stride && left >= 32; byte += 4) {                                                        \
      uint32_t bits = m[byte] | m[byte + 1] << 8 | m[byte + 2] << 16 | (uint32_t)m[byte + 3] << 24;             \
      int first = __builtin_popcount(bits & 0xffff);                                                            \
      __builtin_prefetch((const char *)v + AHEAD);                                                              \
      even = _mm512_fmadd_ps(expand_##KIND(bits, v), _mm512_loadu_ps(x + 8 * byte), even);                      \
      odd = _mm512_fmadd_ps(expand_##KIND(bits >> 16, v + first), _mm512_loadu_ps(x + 8 * byte + 16), odd);     \
      v += __builtin_popcount(bits), left -= __builtin_popcount(bits);                                          \
    }                                                                                                           \
    for (; byte < stride; byte++) {                                                                             \
      TYPE last[16] = {0}; /* nothing is read beyond the values */                                              \
      int count = __builtin_popcount(m[byte]);                                                                  \
      for (int i = 0; i < count; i++) last[i] = v[i];                                                           \
      even = _mm512_fmadd_ps(expand_##KIND(m[byte], last), _mm512_loadu_ps(x + 8 * byte), even);                \
      v += count;                                                                                               \
    }                                                                                                           \
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));                                                      \
  }

#define PRODUCT(KIND, TYPE)                                                                                     \
  static float dot_##KIND(const TYPE *v, const float *x, int64_t size) {                                        \
    __m256 sum = _mm256_setzero_ps();                                                                           \
    float lanes[8], total = 0;                                                                                  \
    TYPE last[8] = {0};                                                                                         \
    int64_t whole = size / 8 * 8;                                                                               \
    for (int64_t i = 0; i < whole; i += 8)                                                                      \
      sum = _mm256_fmadd_ps(read_##KIND(v + i), _mm256_loadu_ps(x + i), sum);                                   \
    for (int64_t i = whole; i < size; i++) last[i - whole] = v[i];                                              \
    if (size > whole) sum = _mm256_fmadd_ps(read_##KIND(last), _mm256_loadu_ps(x + whole), sum);                \
    _mm256_storeu_ps(lanes, sum);                                                                               \
    for (int i = 0; i < 8; i++) total += lanes[i];                                                              \
    return total;                                                                                               \
  }                                                                                                             \
  int multiply_##KIND(const uint8_t *mask, const TYPE *values, const int64_t *starts, const TYPE *inputs,       \
                      const TYPE *A, const TYPE *B, const TYPE *bias, TYPE *y, const int32_t *places,           \
                      int64_t outs, int64_t ins, int64_t rank, int threads) {                                   \
    int64_t stride = (ins + 7) / 8, padded = (8 * stride + 63) / 32 * 32, ranks = (rank + 31) / 16 * 16;        \
    int64_t bytes = (padded + ranks) * sizeof(float) + (padded * sizeof(TYPE) + 63) / 64 * 64;                  \
    float *x = aligned_alloc(64, bytes), *u = x + padded;                                                       \
    if (!x) return 0;                                                                                           \
    memset(x, 0, bytes); /* what is read of them beyond their ends is zero */                                   \
    TYPE *given = memcpy(u + ranks, inputs, ins * sizeof(TYPE));                                                \
    for (int64_t i = 0; i < ins; i += 8) _mm256_store_ps(x + i, read_##KIND(given + i));                        \
    row_##KIND multiply = choose_##KIND();                                                                      \
    _Pragma("omp parallel num_threads(threads)") {                                                              \
      _Pragma("omp for schedule(static)")                                                                       \
      for (int64_t q = 0; q < rank; q++) u[q] = dot_##KIND(A + q * ins, x, ins);                                \
      _Pragma("omp for schedule(static)")                                                                       \
      for (int64_t row = 0; row < outs; row++) {                                                                \
        float sum = multiply(mask + row * stride, values + starts[row], starts[outs] - starts[row],             \
                             x, given, places, stride);                                                         \
        if (rank) sum += dot_##KIND(B + row * rank, u, rank);                                                   \
        y[row] = store_##KIND(bias ? sum + scalar_##KIND(bias[row]) : sum);                                     \
      }                                                                                                         \
    }                                                                                                           \
    free(x);                                                                                                    \
    return 1;                                                                                                   \
  }

ROWS(f32, float)
ROWS(f16, uint16_t)
ROWS(bf16, uint16_t)

#if defined(__clang__) || __GNUC__ >= 10 /* that know these instructions */
/* 32 columns at a time, which are multiplied in pairs. */
PAIRED static float paired_bf16(ROW(uint16_t)) {
  int64_t byte = 0;
  __m512 even = _mm512_setzero_ps(), odd = even;
  for (; byte + 7 < stride && left >= 64; byte += 8) {
    uint64_t bits;
    memcpy(&bits, m + byte, 8);
    int first = __builtin_popcount((uint32_t)bits), both = __builtin_popcountll(bits);
    __builtin_prefetch((const char *)v + AHEAD);
    __m512i lower = _mm512_maskz_expand_epi16((__mmask32)bits, _mm512_loadu_si512(v));
    __m512i upper = _mm512_maskz_expand_epi16((__mmask32)(bits >> 32), _mm512_loadu_si512(v + first));
    even = _mm512_dpbf16_ps(even, (__m512bh)lower, (__m512bh)_mm512_load_si512(given + 8 * byte));
    odd = _mm512_dpbf16_ps(odd, (__m512bh)upper, (__m512bh)_mm512_load_si512(given + 8 * byte + 32));
    v += both, left -= both;
  }
  float rest = wide_bf16(m + byte, v, left, x + 8 * byte, given, places, stride - byte);
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) + rest;
}

#define HAS_PAIRED __builtin_cpu_supports("avx512bf16")
#else
#define HAS_PAIRED 0
#define paired_bf16 wide_bf16
#endif

static int has_wide() { return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl"); }
static row_f32 choose_f32() { return has_wide() ? wide_f32 : narrow_f32; }
static row_f16 choose_f16() { return has_wide() ? wide_f16 : narrow_f16; }
static row_bf16 choose_bf16() {
  if (!has_wide()) return narrow_bf16;
  return HAS_PAIRED ? paired_bf16 : wide_bf16;
}

PRODUCT(f32, float)
PRODUCT(f16, uint16_t)
PRODUCT(bf16, uint16_t)

/* Rows of S in full; an entry is TYPE wide, whatever it stands for. */
#define UNPACK(BITS, TYPE)                                                                                      \
  static void plain_##BITS(const uint8_t *m, const TYPE *v, TYPE *row, int64_t from, int64_t ins) {             \
    for (int64_t i = from; i < ins; i++) row[i] = m[i / 8] >> i % 8 & 1 ? *v++ : 0;                             \
  }                                                                                                             \
  WIDE static void wide_##BITS(const uint8_t *m, const TYPE *v, int64_t left, TYPE *row, int64_t ins) {         \
    int64_t i = 0, side = 64 / sizeof(TYPE);                                                                    \
    for (; i + side <= ins && left >= side; i += side) {                                                        \
      uint32_t bits = 0;                                                                                        \
      memcpy(&bits, m + i / 8, side / 8);                                                                       \
      __m512i entries = _mm512_loadu_si512(v);                                                                  \
      _mm512_storeu_si512(row + i, _mm512_maskz_expand_epi##BITS(bits, entries));                               \
      v += __builtin_popcount(bits), left -= __builtin_popcount(bits);                                          \
    }                                                                                                           \
    plain_##BITS(m, v, row, i, ins);                                                                            \
  }                                                                                                             \
  void unpack_##BITS(const uint8_t *mask, const TYPE *values, const int64_t *starts, TYPE *dense, int64_t outs, \
                     int64_t ins, int threads) {                                                                \
    int wide = has_wide();                                                                                      \
    _Pragma("omp parallel for schedule(static) num_threads(threads)")                                           \
    for (int64_t row = 0; row < outs; row++) {                                                                  \
      const uint8_t *m = mask + row * ((ins + 7) / 8);                                                          \
      if (wide) wide_##BITS(m, values + starts[row], starts[outs] - starts[row], dense + row * ins, ins);       \
      else plain_##BITS(m, values + starts[row], dense + row * ins, 0, ins);                                    \
    }                                                                                                           \
  }

UNPACK(16, uint16_t)
UNPACK(32, uint32_t)
"""


def supports(dtype: torch.dtype) -> bool:
    """Whether `multiply` runs here for values of this dtype; the first call may compile."""
    return dtype in _KINDS and _library() is not None


def takes(*tensors: torch.Tensor) -> bool:
    """Whether all are in the memory that C reads: on the CPU, and no subclass, which may stand for anything."""
    return all(t.device.type == "cpu" and type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)


def _check_values(values: torch.Tensor, starts: torch.Tensor) -> None:
    if values.numel() != int(starts[-1]):
        raise ValueError(f"values hold {values.numel()} entries: the mask keeps {int(starts[-1])}")


def multiply(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
    starts: torch.Tensor,
) -> torch.Tensor:
    """x S^T + (x A^T) B^T + bias, summed in FP32.

    Args:
        inputs: x (in,), FP32, BF16 or FP16.
        mask: the packed mask, uint8 (out, ceil(in / 8)).
        values: (nonzeros,), A (rank, in), B (out, rank) and bias (out,): the dtype of the inputs.
        starts: int64 (out + 1,): the first value of each row, and the end.

    Returns:
        (out,), the dtype of the inputs.
    """
    _check_values(values, starts)
    given = [None if t is None else t.contiguous() for t in (mask, values, starts, inputs, A, B, bias)]
    y = inputs.new_empty(len(mask))
    done = getattr(_library(), f"multiply_{_KINDS[values.dtype]}")(
        *(None if tensor is None else tensor.data_ptr() for tensor in (*given, y, _places())),
        len(mask), len(inputs), 0 if A is None else len(A), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for {len(inputs)} inputs")
    return y


def unpack(mask: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, in_features: int) -> torch.Tensor:
    """`packing.unpack`: S (out, in), the dtype of the values; `starts` as for `multiply`."""
    _check_values(values, starts)
    given = [tensor.contiguous() for tensor in (mask, values, starts)]
    dense = values.new_empty(len(mask), in_features)
    getattr(_library(), f"unpack_{8 * values.element_size()}")(
        *(tensor.data_ptr() for tensor in (*given, dense)), len(mask), in_features, torch.get_num_threads()
    )
    return dense


@functools.cache
def _places() -> torch.Tensor:
    """int32 (256, 8): the rank of each set bit among those of its byte, -1 for the others."""
    bits = (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1
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
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for kind in _KINDS.values() if library else ():
        function = getattr(library, f"multiply_{kind}")
        function.argtypes, function.restype = [*[pointer] * 9, *[number] * 3, ctypes.c_int], ctypes.c_int
    for function in (library.unpack_16, library.unpack_32) if library else ():
        function.argtypes, function.restype = [*[pointer] * 4, *[number] * 2, ctypes.c_int], None
    return library
