"""Operators of a block as fused kernels on a GPU: RMS norms and attention."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..utils.determinism import deterministic_kernels

LARGEST_HALF = torch.finfo(torch.float16).max
LARGEST_GRADIENT = 2.0**-4  # of an attention's outputs in FP16: their products must not overflow
REPRODUCIBLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # those that can be


@contextmanager
def fused_operators(block: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Inside, a block that works on CUDA takes fused kernels. Elsewhere, and in full FP32, it stays as it is."""
    if device.type != "cuda" or precision == "fp32":
        yield
        return
    with fused_norms([block], device, precision), FusedAttention():
        yield


@contextmanager
def fused_norms(modules: list[nn.Module], device: torch.device, precision: str) -> Iterator[None]:
    """Inside, the RMS norms of modules that work on CUDA, other than in full FP32, take torch's fused kernel."""
    norms: dict[nn.Module, Callable] = {}
    if device.type == "cuda" and precision != "fp32":
        for module in modules:
            norms |= rms_norms(module)
    for norm, forward in norms.items():
        norm.forward = forward
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def rms_norms(block: nn.Module) -> dict[nn.Module, Callable]:
    """The forward passes to take instead of those of the modules that behave like RMS norms."""
    found = {}
    for module in block.modules():
        if (kind := _rms_norm(module)) is not None:
            found[module] = _fused(module, *kind)
    return found


def _fused(module: nn.Module, offset: float, eps: float) -> Callable:
    original = module.forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or hidden.dtype != torch.float32:  # a gate, for example, makes it more than a norm
            return original(hidden, *args, **kwargs)
        weight = module.weight + offset if offset else module.weight
        return F.rms_norm(hidden, weight.shape, weight, eps)

    return forward


@torch.no_grad()
def _rms_norm(module: nn.Module) -> tuple[float, float] | None:
    """(what is added to the weight, epsilon) of a module that behaves like an RMS norm."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].ndim != 1 or "forward" in vars(module):
        return None
    weight = parameters["weight"]
    rows = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0))
    rows = (rows * torch.tensor([[1.0], [1e-3]])).to(weight.device)  # epsilon shows in small rows only
    try:
        expected = module.forward(rows)
    except Exception:  # no norm
        return None
    for eps in {value for value in vars(module).values() if isinstance(value, float)}:
        for offset in (0.0, 1.0):
            if torch.allclose(F.rms_norm(rows, weight.shape, weight + offset, eps), expected, 1e-4, 1e-6):
                return offset, eps
    return None


class FusedAttention(TorchFunctionMode):
    """Inside, attention takes fused kernels where they fit, and its gradients are the same bits each time.

    Under autocast it runs in that dtype. Otherwise FP32 tensors are rounded to FP16, whose significand is that of TF32:
    torch has no fused kernel in FP32 for keys that heads share.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            func = attention
        return func(*args, **(kwargs or {}))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` as in `FusedAttention`, or as it is where no fused kernel fits."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    dtype = torch.float16 if dtype == torch.float32 else dtype
    if not _fits(query, key, value, attn_mask, dtype, options):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    return _Attention.apply(query, key, value, attn_mask, dtype, options)


def _fits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> bool:
    """Whether a fused kernel takes such arguments in a dtype. A mask is not rounded to FP16, and gets no gradient."""
    masked = mask is not None and (dtype == torch.float16 or mask.requires_grad)
    if not query.is_cuda or options["dropout_p"] or masked:
        return False
    tensors = [torch.empty_like(tensor, dtype=dtype) for tensor in (query, key, value)]
    if mask is not None and mask.is_floating_point():
        mask = torch.empty_like(mask, dtype=dtype)
    params = cuda.SDPAParams(*tensors, mask, 0.0, options["is_causal"], options["enable_gqa"])
    return cuda.can_use_flash_attention(params) or cuda.can_use_efficient_attention(params)


class _Attention(torch.autograd.Function):
    """Computes the outputs again for the gradients: only torch's own function knows what its kernels save."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dtype: torch.dtype,
        options: dict[str, Any],
    ) -> torch.Tensor:
        tensors = [_rounded(tensor, dtype) for tensor in (query, key, value)]
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype)
        ctx.save_for_backward(*tensors, mask)
        ctx.options, ctx.dtypes = options, (query.dtype, key.dtype, value.dtype)
        with torch.autocast(query.device.type, enabled=False):
            outputs = F.scaled_dot_product_attention(*tensors, mask, **options)
        return outputs.float() if dtype == torch.float16 else outputs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, mask = ctx.saved_tensors
        tensors, scale = [tensor.detach().requires_grad_() for tensor in saved], None
        if tensors[0].dtype == torch.float16:  # its range is too small for gradients
            scale = LARGEST_GRADIENT / gradient.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            gradient = gradient * scale
        with torch.enable_grad(), sdpa_kernel(REPRODUCIBLE), torch.autocast(gradient.device.type, enabled=False):
            outputs = F.scaled_dot_product_attention(*tensors, mask, **ctx.options)
            with deterministic_kernels():
                found = torch.autograd.grad(outputs, tensors, gradient.to(outputs.dtype))
        if scale is not None:
            found = tuple(each.float().div_(scale) for each in found)
        return *(each.to(dtype) for each, dtype in zip(found, ctx.dtypes, strict=True)), None, None, None


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16:
        tensor = tensor.clamp(-LARGEST_HALF, LARGEST_HALF)
    return tensor.to(dtype)
