"""The entry to the packed product: chooses between operators, the reference and plain torch."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch.autograd import forward_ad

from ..utils.availability import TRITON
from . import ops
from .bindings import tensors_of
from .fast_calls.layer_calls import LayerCalls
from .override import KERNELS, chosen_kernel
from .packed_weight import PackedWeight
from .reference import autocast_dtype, plain_linear, reference_linear

__all__ = ["KERNELS", "packed_linear", "packed_linears"]

_PLAIN = {torch.Tensor, torch.nn.Parameter}  # another subclass may stand for anything
_requires_grad = attrgetter("requires_grad")


def packed_linear(
    inputs: torch.Tensor, weight: PackedWeight, kernel: str = "auto", calls: LayerCalls | None = None
) -> torch.Tensor:
    """x S^T + (x A^T) B^T + bias. Follows autocast, as F.linear does.

    On CUDA the operator of `ops`, differentiable once; elsewhere too if nothing is differentiated. Else the
    reference, differentiable twice.

    Args:
        inputs: x (..., in).
        weight: S + B A and a bias.
        kernel: "auto" takes what was measured to be the fastest, "packed" never unpacks S for up to 16 rows of x,
            "dense" keeps S + B A in memory. The environment variable HF_SPARSELR_KERNEL overrides it.
        calls: what the layer keeps for C.

    Returns:
        (..., out).

    Raises:
        ValueError: an unknown kernel; shapes or devices that do not fit together.
        TypeError: floats of different dtypes.
    """
    return packed_linears(inputs, (weight,), kernel, calls)[0]


def packed_linears(
    inputs: torch.Tensor, weights: Sequence[PackedWeight], kernel: str = "auto", calls: LayerCalls | None = None
) -> list[torch.Tensor]:
    """`packed_linear` for weights with the same input: few rows on a GPU take one launch.

    Args:
        calls: of a single weight.

    Returns:
        (..., out) of each.
    """
    if torch.compiler.is_compiling():
        return _traced(inputs, weights, kernel)
    kernel = chosen_kernel(kernel)
    tensors = tensors_of(weights)
    plain = type(inputs) in _PLAIN and _PLAIN.issuperset(map(type, tensors)) and not inputs.is_meta
    if plain and inputs.is_cuda and _is_quiet("cuda"):  # the usual case, in which the host's time matters
        return (
            ops.products(inputs, weights, kernel, tensors)
            if calls is None
            else [_called(inputs, weights[0], kernel, calls)]
        )
    dtype = autocast_dtype(inputs)
    if dtype is not None:
        inputs, weights = inputs.to(dtype), [weight.to(dtype) for weight in weights]
        tensors = tensors_of(weights)
    if _is_transformed():
        return [plain_linear(inputs, weight) for weight in weights]
    if not plain:
        return [reference_linear(inputs, weight) for weight in weights]
    if torch.is_grad_enabled() and (inputs.requires_grad or any(map(_requires_grad, tensors))):
        return [_differentiable(inputs, weight, kernel, calls) for weight in weights]
    if torch._C._len_torch_dispatch_stack():  # a mode that wants to see operators
        return [ops.linear(inputs, *weight, kernel) for weight in weights]
    if calls is not None and inputs.is_cuda:
        with torch.no_grad():
            return [_called(inputs, weights[0], kernel, calls)]
    return ops.products(inputs, weights, kernel, tensors)


def asks_for_values(inputs: torch.Tensor) -> bool:
    """Whether nothing but the values of a product of x on a CUDA device is asked for, and x is no subclass."""
    if torch.is_grad_enabled():
        if inputs.requires_grad:
            return False
        with torch.no_grad():
            return asks_for_values(inputs)
    return type(inputs) in _PLAIN and _is_quiet("cuda")


def _is_quiet(kind: str) -> bool:
    """No gradients, autocast, transforms or modes, which might want something else than the product."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(kind)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _traced(inputs: torch.Tensor, weights: Sequence[PackedWeight], kernel: str) -> list[torch.Tensor]:
    """As torch.compile is to see it: operators, whose checks come when they run."""
    dtype = autocast_dtype(inputs)
    if dtype is not None:
        inputs, weights = inputs.to(dtype), [weight.to(dtype) for weight in weights]
    kind = inputs.device.type
    differentiated = torch.is_grad_enabled() and (inputs.requires_grad or any(map(_trains, weights)))
    if not _has_operator(kind, differentiated):
        return [reference_linear(inputs, weight) for weight in weights]
    if differentiated or kind == "cpu" or len(weights) == 1:
        return [ops.linear(inputs, *weight, _unless_trained(kernel, weight)) for weight in weights]
    *parts, widths = (list(part) for part in zip(*weights, strict=True))
    return ops.linears(inputs, *parts, widths[0], kernel)


def _called(inputs: torch.Tensor, weight: PackedWeight, kernel: str, calls: LayerCalls) -> torch.Tensor:
    return calls.product(inputs, weight, kernel, ops.product)


def _differentiable(inputs: torch.Tensor, weight: PackedWeight, kernel: str, calls: LayerCalls | None) -> torch.Tensor:
    if not _has_operator(inputs.device.type, True):
        weight.check()
        return reference_linear(inputs, weight)
    kernel = _unless_trained(kernel, weight)
    if torch._C._len_torch_dispatch_stack():  # a mode that wants to see operators
        return ops.linear(inputs, *weight, kernel)
    return ops.Differentiable.apply(inputs, *weight, kernel, calls)


def _unless_trained(kernel: str, weight: PackedWeight) -> str:
    """What is being trained changes with every step: there is nothing to keep."""
    return "auto" if kernel == "dense" and torch.is_grad_enabled() and _trains(weight) else kernel


def _has_operator(kind: str, differentiated: bool) -> bool:
    return (kind == "cuda" and TRITON) or (kind == "cpu" and not differentiated)


def _trains(weight: PackedWeight) -> bool:
    return any(tensor.requires_grad for tensor in weight.tensors)


def _is_transformed() -> bool:
    """Within vmap, grad or jvp of `torch.func`, or forward-mode derivatives."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
