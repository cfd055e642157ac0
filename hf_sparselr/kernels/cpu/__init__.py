"""x S^T + (x A^T) B^T + bias on the CPU, and S in full: C, compiled on first use, as no torch operator reads S packed.

All sums are in FP32, so that 16 bits cost a CPU without instructions for them no time. `few_rows.c` takes few rows, by
`across.c`; `along.c` many; `panels.c` many where the CPU multiplies pairs of BF16.
"""

import ctypes
import functools
import importlib.resources
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ...utils.c_compiler import load
from ...utils.precision import X86, multiplies_natively
from ..packed_weight import PackedWeight, check_count
from ..program import Program

logger = logging.getLogger(__name__)

_PARTS = ("values.c", "across.c", "few_rows.c", "along.c", "pairs.c", "tiles.c", "panels.c", "packed.c")
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_KINDS = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
_X86_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")
_ACROSS_ROWS = 16  # of x that C multiplies faster than oneDNN where the CPU has instructions for the dtype


def supports(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for values of this dtype; the first call may compile."""
    return dtype in _KINDS and _library(_KINDS[dtype]) is not None


def takes(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether everything is in memory that C reads: on the CPU, and no subclass, which may stand for anything."""
    return all(tensor.is_cpu and type(tensor) in _PLAIN for tensor in tensors)


def prefers(dtype: torch.dtype, rows: int) -> bool:
    """Whether the kernels are faster than unpacking S for oneDNN."""
    if dtype == torch.float32 or rows <= _ACROSS_ROWS or not multiplies_natively(dtype):
        return True
    return dtype == torch.bfloat16 and _has_panels()


def _has_panels() -> bool:
    """Whether C multiplies many rows of BF16 by the fastest instructions of this CPU."""
    library = _library("BF16")
    return library is not None and bool(library.has_panels(_level()))


@functools.cache
def _level() -> int:
    """Of instructions that may be used: 0 AVX2 or no x86, 1 AVX-512, 2 AMX too, if the system lets this process use it.

    Follows ATEN_CPU_CAPABILITY, as torch does.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return 0
    return 2 if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else 1


class _Weight(ctypes.Structure):
    """`Weight` of `values.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mask", "values", "A", "B", "bias")),
        *((name, ctypes.c_int64) for name in ("nonzeros", "outs", "ins", "rank")),
    )

    @classmethod
    def of(cls, weight: PackedWeight) -> "_Weight":
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in weight[:5])
        return cls(*pointers, weight.values.numel(), weight.out_features, weight.in_features, weight.rank)


class _Products:
    """`multiply` of `packed.c` as the step of a program."""

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        self._function = _library(_KINDS[weights[0].values.dtype]).multiply
        self._array = (_Weight * len(weights))(*map(_Weight.of, weights))
        self._addresses = ctypes.c_void_p * len(weights)

    def run(self, slots: list[Any], weights: Sequence[PackedWeight]) -> None:
        rows, inputs, *ys = slots
        kept = ctypes.c_int64()
        _check(
            self._function(
                self._array, len(weights), inputs.data_ptr(), self._addresses(*(y.data_ptr() for y in ys)), rows,
                _level(), torch.get_num_threads(), ctypes.byref(kept),
            ),
            kept, weights,
        )  # fmt: skip

    def moved(self, slot: Callable[[int], int], weight: Callable[[int], int]) -> "_Products":
        raise NotImplementedError("programs of the CPU are not merged")

    def words(self, weights: Sequence[PackedWeight]) -> list[int]:
        function = ctypes.cast(self._function, ctypes.c_void_p).value or 0
        size = ctypes.sizeof(self._array) // ctypes.sizeof(ctypes.c_int64)
        return [4, function, _level(), len(weights), size, *(ctypes.c_int64 * size).from_buffer(self._array)]


def bind(weights: Sequence[PackedWeight]) -> Program:
    """The product of weights with the same input: x S^T + (x A^T) B^T + bias of each, summed in FP32.

    Args:
        weights: checked, contiguous, of one width and dtype. Only their addresses are kept.

    Returns:
        The product of x of the weights' dtype. It raises ValueError if a mask keeps another number of values than there
        are, and MemoryError if there is no memory for x in FP32.
    """
    return Program(tuple(weight.out_features for weight in weights), (), (_Products(weights),))


def multiply(inputs: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`bind` and the product of one weight: x (..., in) to (..., out)."""
    plain = (weight.contiguous(),)
    return bind(plain)(inputs.contiguous(), inputs.shape[:-1].numel(), plain)[0]


def unpack_then_gemm(inputs: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The product of one weight by oneDNN: x (rows, in) to (rows, out)."""
    out = F.linear(inputs, unpack(weight), weight.bias)
    return out if weight.A is None else out.addmm_(F.linear(inputs, weight.A), weight.B.T)


def unpack(weight: PackedWeight) -> torch.Tensor:
    """`format.bitmask.unpack`: S (out, in), the dtype of the values.

    Raises:
        ValueError: the mask keeps another number of values than there are.
    """
    plain, kept = weight.contiguous(), ctypes.c_int64()
    dense = plain.values.new_empty(plain.out_features, plain.in_features)
    function = _library(_KINDS[dense.dtype]).unpack
    size = torch.get_num_threads()
    _check(function(_Weight.of(plain), dense.data_ptr(), _level(), size, ctypes.byref(kept)), kept, (plain,))
    return dense


def _check(failed: int, kept: ctypes.c_int64, weights: Sequence[PackedWeight]) -> None:
    """Raises what a function of C reports."""
    if failed == 1:
        raise MemoryError(f"no memory to multiply by a packed layer of {weights[0].in_features} inputs")
    if failed:
        check_count(weights[failed - 3], kept.value)


@functools.cache
def _library(kind: str) -> ctypes.CDLL | None:
    if X86 and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        logger.warning(
            "packed layers run several times slower than dense ones on a CPU without AVX2; load with kernel='dense'"
        )
        return None
    folder = importlib.resources.files(__package__)
    library = load(
        "packed",
        "".join(f'#line 1 "{part}"\n{folder.joinpath(part).read_text(encoding="utf-8")}' for part in _PARTS),
        "packed layers run on the CPU without their compiled kernel, several times slower than dense ones (%s): "
        "install a C compiler with OpenMP, or load with kernel='dense'",
        (f"-D{kind}", *(_X86_FLAGS if X86 else ())),
    )
    if library is not None:
        pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.multiply.argtypes = [pointer, number, pointer, pointer, number, small, small, pointer]
        library.has_panels.argtypes = [small]
        library.unpack.argtypes = [ctypes.POINTER(_Weight), pointer, small, small, pointer]
    return library
