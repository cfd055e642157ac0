"""x S^T + (x A^T) B^T + bias on the CPU, and S in full: C, compiled on first use, as no torch operator reads S packed.

All sums are in FP32, so that 16 bits cost a CPU without instructions for them no time. See `packed.c` for how.
"""

import ctypes
import functools
import importlib.resources
import logging

import torch

from ...utils.c_compiler import load
from ...utils.precision import X86, multiplies_natively
from ..packed_weight import PackedWeight, check_count

logger = logging.getLogger(__name__)

_KINDS = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
_X86_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")
_ACROSS_ROWS = 16  # of x that C multiplies faster than oneDNN in BF16 where the CPU has instructions for it

# Whether AVX-512 may be used; follows ATEN_CPU_CAPABILITY, as torch does.
_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"


def supports(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for values of this dtype; the first call may compile."""
    return dtype in _KINDS and _library(_KINDS[dtype]) is not None


def takes(weight: PackedWeight, *others: torch.Tensor) -> bool:
    """Whether everything is in memory that C reads: on the CPU, and no subclass, which may stand for anything."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return all(t.device.type == "cpu" and type(t) in plain for t in (*weight.tensors, *others))


def prefers(weight: PackedWeight, rows: int) -> bool:
    """Whether `multiply` is faster than unpacking S for oneDNN."""
    dtype = weight.values.dtype
    return dtype == torch.float32 or rows <= _ACROSS_ROWS or not multiplies_natively(dtype)


def multiply(inputs: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x S^T + (x A^T) B^T + bias, summed in FP32.

    Args:
        inputs: x (rows, in), FP32, BF16 or FP16, at least one row.
        weight: checked, of the dtype of the inputs.

    Returns:
        (rows, out), the dtype of the inputs.

    Raises:
        ValueError: the mask keeps another number of values than there are.
        MemoryError: no memory for x in FP32.
    """
    inputs, (mask, values, A, B, bias, ins) = inputs.contiguous(), weight.contiguous()
    y = inputs.new_empty(inputs.shape[0], mask.shape[0])
    _call(
        "multiply", weight, (mask, values, A, B, bias, inputs, y),
        (values.numel(), inputs.shape[0], mask.shape[0], ins, weight.rank),
    )  # fmt: skip
    return y


def unpack(weight: PackedWeight) -> torch.Tensor:
    """`format.bitmask.unpack`: S (out, in), the dtype of the values.

    Raises:
        ValueError: the mask keeps another number of values than there are.
    """
    mask, values, *_, ins = weight.contiguous()
    dense = values.new_empty(mask.shape[0], ins)
    _call("unpack", weight, (mask, values, dense), (values.numel(), mask.shape[0], ins))
    return dense


def _call(name: str, weight: PackedWeight, tensors: tuple, sizes: tuple[int, ...]) -> None:
    kept = ctypes.c_int64()
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    function = getattr(_library(_KINDS[weight.values.dtype]), name)
    failed = function(*pointers, *sizes, _WIDE, torch.get_num_threads(), ctypes.byref(kept))
    if failed == 1:
        raise MemoryError(f"no memory to multiply by a packed layer of {sizes}")
    if failed:
        check_count(weight, kept.value)


@functools.cache
def _library(kind: str) -> ctypes.CDLL | None:
    if X86 and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        logger.warning(
            "packed layers run several times slower than dense ones on a CPU without AVX2; load with kernel='dense'"
        )
        return None
    library = load(
        "packed",
        importlib.resources.files(__package__).joinpath("packed.c").read_text(encoding="utf-8"),
        "packed layers run on the CPU without their compiled kernel, several times slower than dense ones (%s): "
        "install a C compiler with OpenMP, or load with kernel='dense'",
        (f"-D{kind}", *(_X86_FLAGS if X86 else ())),
    )
    if library is not None:
        pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.multiply.argtypes = [*[pointer] * 7, *[number] * 5, small, small, pointer]
        library.unpack.argtypes = [*[pointer] * 3, *[number] * 3, small, small, pointer]
    return library
