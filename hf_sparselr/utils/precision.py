"""The precision of matrix products."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "tf32", "bf16")
# torch's names: LEVELS for the FP32 products that run beside products in a precision, _LEVELS_OF_PRODUCTS for FP32
# products that are themselves to run in that precision (not on CUDA).
LEVELS = {"fp32": "highest", "tf32": "high", "bf16": "high"}
_LEVELS_OF_PRODUCTS = {**LEVELS, "bf16": "medium"}
# Weights of a layer. Arithmetic and memory limit the speed of larger layers, launches that of smaller ones.
LARGE = 2**22


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Runs matrix products in "fp32", "tf32" or "bf16" (autocast) inside the block."""
    if precision == "bf16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    else:
        with matmuls(LEVELS[precision]):
            yield


@contextmanager
def plain_modes(device: torch.device) -> Iterator[None]:
    """Inside, no mode of the caller changes arithmetic: inference mode, autocast, a default dtype other than FP32."""
    dtype = torch.get_default_dtype()
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)


def coarsest(device: torch.device) -> str:
    """The lowest precision in which the device multiplies faster than in FP32."""
    return "bf16" if device.type == "cuda" or (device.type == "cpu" and _cpu_has_bf16()) else "fp32"


def finer(precision: str, device: torch.device) -> str:
    """The next finer precision that the device has."""
    return "tf32" if precision == "bf16" and device.type == "cuda" else "fp32"


@functools.cache
def _cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for BF16 products; without them they are slower than FP32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def product(left: torch.Tensor, right: torch.Tensor, precision: str) -> torch.Tensor:
    """left @ right of FP32 matrices in "fp32", "tf32" or "bf16" (rounded factors, FP32 sums)."""
    if precision == "bf16" and left.is_cuda:
        return torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
    with matmuls(_LEVELS_OF_PRODUCTS[precision]):
        return left @ right


def subtract_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, precision: str) -> torch.Tensor:
    """Subtracts left @ right from `total` in place; see `product`."""
    if precision == "bf16" and total.is_cuda:
        factors = left.bfloat16(), right.bfloat16()
        return torch.addmm(total, *factors, out_dtype=torch.float32, alpha=-1, out=total)
    with matmuls(_LEVELS_OF_PRODUCTS[precision]):
        return total.addmm_(left, right, alpha=-1)


@contextmanager
def matmuls(precision: str) -> Iterator[None]:
    """Runs FP32 matrix products in full ("highest"), on TF32 units if there are any ("high"), or on the BF16 units of a
    CPU that has them ("medium").

    The user's settings are ignored inside the block and restored after it.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    settings = [backend.fp32_precision for backend in backends]
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user set the backends differently, which has no common name
        common = "highest"
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(common)
        for backend, before in zip(backends, settings, strict=True):
            backend.fp32_precision = before
