"""The plain path: unpack S for the length of one call, in forward and again in backward."""

import torch
from torch.nn import functional as F

from ..format.bitmask import unpack, unpack_mask
from ..utils.precision import multiplies_natively
from . import cpu
from .packed_weight import PackedWeight, check_count


class _SparseLinear(torch.autograd.Function):
    """y = x S^T. Saves the packed S only, so no dense copy outlives a call."""

    @staticmethod
    def forward(ctx, inputs, mask, values, in_features):
        ctx.in_features = in_features
        ctx.save_for_backward(inputs if ctx.needs_input_grad[2] else None, mask, values)
        return _multiply(inputs, _unpack(mask, values, in_features).T)

    @staticmethod
    def backward(ctx, grad):
        inputs, mask, values = ctx.saved_tensors
        grad_inputs = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_inputs = _multiply(grad, _unpack(mask, values, ctx.in_features))
        if ctx.needs_input_grad[2]:
            dense = _multiply(grad.reshape(-1, grad.shape[-1]).T, inputs.reshape(-1, ctx.in_features))
            grad_values = dense[unpack_mask(mask, ctx.in_features)]
        return grad_inputs, None, grad_values, None


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left (..., k) @ right (k, n), in FP32 inside where a CPU has no instructions for 16 bits."""
    if left.device.type != "cpu" or multiplies_natively(left.dtype):
        return left @ right
    return _ProductInFP32.apply(left, right)


class _ProductInFP32(torch.autograd.Function):
    """left (..., k) @ right (k, n). Saves them in their own 16 bits."""

    @staticmethod
    def forward(ctx, left, right):
        ctx.save_for_backward(left, right)
        with torch.autocast("cpu", enabled=False):
            return (left.float() @ right.float()).to(left.dtype)

    @staticmethod
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        of_left = _multiply(grad, right.T) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_left, None
        return of_left, _multiply(left.reshape(-1, left.shape[-1]).T, grad.reshape(-1, grad.shape[-1]))


def _unpack(mask: torch.Tensor, values: torch.Tensor, in_features: int) -> torch.Tensor:
    """`unpack`, in C where nothing has to follow it: no second derivative, no compiler, no mode."""
    weight = PackedWeight(mask, values, None, None, None, in_features)
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if torch.is_grad_enabled() or watched or not cpu.takes((mask, values)) or not cpu.supports(values.dtype):
        if not watched:
            count_values(weight)
        return unpack(mask, values, in_features)
    return cpu.unpack(weight)


def count_values(weight: PackedWeight) -> None:
    """Checks that there is a value for every kept column. A GPU is not waited for: `gpu` counts for its kernels.

    Raises:
        ValueError: see `check_count`.
    """
    if weight.mask.is_cpu and type(weight.mask) in (torch.Tensor, torch.nn.Parameter):
        check_count(weight, int(unpack_mask(weight.mask, weight.in_features).sum()))


def sparse_linear(inputs: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, in_features: int) -> torch.Tensor:
    """x S^T from the packed S, differentiable in x and the values. Follows autocast, as F.linear does.

    Args:
        inputs: (..., in).
        mask: uint8 (out, ceil(in / 8)), see `format.bitmask`.
        values: (nonzeros,), same dtype and device as the inputs.
        in_features: in.

    Returns:
        (..., out).
    """
    dtype = autocast_dtype(inputs)
    if dtype is not None:
        inputs, values = inputs.to(dtype), values.to(dtype)
    return _SparseLinear.apply(inputs, mask, values, in_features)


def autocast_dtype(inputs: torch.Tensor) -> torch.dtype | None:
    """What F.linear would compute in under autocast; None without it."""
    if inputs.is_cuda or inputs.is_cpu:
        kind = "cuda" if inputs.is_cuda else "cpu"
    else:
        kind = inputs.device.type
        if not torch.amp.is_autocast_available(kind):
            return None
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def reference_linear(inputs: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x S^T + bias + (x A^T) B^T, differentiable in everything but the mask, twice.

    In this order: replacing adapters, which add their part last, stay exact.
    """
    mask, values, A, B, bias, in_features = weight
    out = sparse_linear(inputs, mask, values, in_features)
    if bias is not None:
        out = out + bias.to(out.dtype)
    if A is not None:
        out = out + _multiply(_multiply(inputs, A.T), B.T)
    return out


def plain_linear(inputs: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The same by torch's own operators alone, for `torch.func` and forward-mode derivatives."""
    return F.linear(inputs, dense_weight(weight), weight.bias)


def dense_weight(weight: PackedWeight) -> torch.Tensor:
    """S + B A (out, in), by torch's own operators alone."""
    S = unpack(weight.mask, weight.values, weight.in_features)
    return S if weight.A is None else S + weight.B @ weight.A


def no_product(inputs: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The product of no rows, or of no columns."""
    shape = *inputs.shape[:-1], weight.out_features
    return inputs.new_zeros(shape) if weight.bias is None else weight.bias.expand(shape).clone()
