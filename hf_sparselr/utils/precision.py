"""The precision of matrix products."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "tf32", "bf16")
LEVELS = {"fp32": "highest", "tf32": "high", "bf16": "high"}  # of the FP32 products beside those in BF16
_OWN = {**LEVELS, "bf16": "medium"}  # of FP32 products that are themselves to be in a precision, off CUDA
LARGE = 2**22  # weights: above, work on a layer is bound by arithmetic and memory; below, by launches


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products in "fp32", "tf32" or "bf16" (autocast)."""
    if precision == "bf16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    else:
        with matmuls(LEVELS[precision]):
            yield


def coarsest(device: torch.device) -> str:
    """The lowest precision in which the device multiplies faster than in FP32."""
    return "bf16" if device.type == "cuda" or (device.type == "cpu" and _cpu_has_bf16()) else "fp32"


def finer(precision: str, device: torch.device) -> str:
    """The next one."""
    return "tf32" if precision == "bf16" and device.type == "cuda" else "fp32"


@functools.cache
def _cpu_has_bf16() -> bool:
    """Whether products of BF16 are instructions: emulated, they are slower than those of FP32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def product(left: torch.Tensor, right: torch.Tensor, precision: str) -> torch.Tensor:
    """left @ right of FP32 matrices in "fp32", "tf32" or "bf16": rounded factors, FP32 sums."""
    if precision == "bf16" and left.is_cuda:
        return torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
    with matmuls(_OWN[precision]):
        return left @ right


def subtract_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, precision: str
) -> torch.Tensor:
    """total - left @ right, see `product`, in the place of `total`."""
    if precision == "bf16" and total.is_cuda:
        factors = left.bfloat16(), right.bfloat16()
        return torch.addmm(total, *factors, out_dtype=torch.float32, alpha=-1, out=total)
    with matmuls(_OWN[precision]):
        return total.addmm_(left, right, alpha=-1)


@contextmanager
def matmuls(precision: str) -> Iterator[None]:
    """FP32 matrix products in full ("highest"), on the TF32 units of devices that have them ("high"), or on the BF16
    units of a CPU that has them ("medium").

    What the user has set does not matter inside and is back afterwards.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    own = [backend.fp32_precision for backend in backends]
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for each backend by itself: there is no common name for that
        common = "highest"
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(common)
        for backend, before in zip(backends, own, strict=True):
            backend.fp32_precision = before
