"""The precision of matrix products."""

import platform
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
X86 = platform.machine() in ("x86_64", "AMD64")


def _emulated_dtypes() -> set[torch.dtype]:
    """The dtypes of 16 bits for which this CPU has no instructions that torch uses."""
    if not torch.backends.mkldnn.is_available() or (X86 and torch.backends.cpu.get_cpu_capability() != "AVX512"):
        return {torch.bfloat16, torch.float16}
    # oneDNN takes BF16 on every CPU with AVX-512, but converts it to FP32 where there are no instructions for it.
    converts = X86 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    emulated = set()
    if converts or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        emulated.add(torch.bfloat16)
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        emulated.add(torch.float16)
    return emulated


_EMULATED = _emulated_dtypes()


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Runs matrix products in "fp32", "tf32" or "bf16" (autocast) inside the block."""
    if precision == "bf16":
        # Its cache would live as long as an outer autocast does, such as that of `plain_modes`, and hold every weight.
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            yield
        return
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


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a dtype. Without them FP32 is several times as fast."""
    return dtype not in _EMULATED


def available(precision: str, device: torch.device) -> str:
    """The precision, or "fp32" for "bf16" on a CPU that has no instructions for it."""
    emulated = precision == "bf16" and device.type == "cpu" and not multiplies_natively(torch.bfloat16)
    return "fp32" if emulated else precision


def coarsest(device: torch.device) -> str:
    """The lowest precision in which the device multiplies faster than in FP32."""
    return available("bf16", device) if device.type in ("cpu", "cuda") else "fp32"


def finer(precision: str, device: torch.device) -> str:
    """The next finer precision that the device has."""
    return "tf32" if precision == "bf16" and device.type == "cuda" else "fp32"


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


def add_bf16_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left @ right of BF16 matrices to `total`, FP32, in place. On CUDA the product is not rounded before."""
    with torch.autocast(total.device.type, enabled=False):  # it would round `total`
        if total.is_cuda:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        else:
            total += left @ right


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
