"""The plain path: unpack S for the length of one call, in forward and again in backward."""

import torch

from ..format.bitmask import unpack, unpack_mask
from . import cpu as native
from .support_index import row_starts


class _SparseLinear(torch.autograd.Function):
    """y = x S^T. Saves the packed S only, so no dense copy outlives a call."""

    @staticmethod
    def forward(ctx, inputs, mask, values, in_features):
        ctx.in_features = in_features
        ctx.save_for_backward(inputs if ctx.needs_input_grad[2] else None, mask, values)
        return torch.nn.functional.linear(inputs, _unpack(mask, values, in_features))

    @staticmethod
    def backward(ctx, grad):
        inputs, mask, values = ctx.saved_tensors
        grad_inputs = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_inputs = grad @ _unpack(mask, values, ctx.in_features)
        if ctx.needs_input_grad[2]:
            dense = grad.reshape(-1, grad.shape[-1]).T @ inputs.reshape(-1, ctx.in_features)
            grad_values = dense[unpack_mask(mask, ctx.in_features)]
        return grad_inputs, None, grad_values, None


def _unpack(mask: torch.Tensor, values: torch.Tensor, in_features: int) -> torch.Tensor:
    """`unpack`, in C where nothing has to follow it: no second derivative, no compiler."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or not native.takes(mask, values)
    if plain or not native.supports(values.dtype):
        return unpack(mask, values, in_features)
    return native.unpack(mask, values, row_starts(mask), in_features)


def sparse_linear(
    inputs: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, in_features: int
) -> torch.Tensor:
    """x S^T from the packed S, differentiable in x and the values. Follows autocast, as F.linear does.

    Args:
        inputs: (..., in).
        mask: uint8 (out, ceil(in / 8)), see `packing`.
        values: (nonzeros,), same dtype and device as the inputs.
        in_features: in.

    Returns:
        (..., out).
    """
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        inputs, values = inputs.to(dtype), values.to(dtype)
    return _SparseLinear.apply(inputs, mask, values, in_features)


def reference_linear(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
) -> torch.Tensor:
    """x S^T + bias + (x A^T) B^T, differentiable in everything but the mask, twice.

    In this order: replacing adapters, which add their part last, stay exact.
    """
    out = sparse_linear(inputs, mask, values, in_features)
    if bias is not None:
        out = out + bias.to(out.dtype)
    if A is not None:
        out = out + torch.nn.functional.linear(torch.nn.functional.linear(inputs, A), B)
    return out
