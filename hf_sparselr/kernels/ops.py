"""The packed product as torch operators: opaque to torch.compile (no graph breaks), safe in CUDA graphs.

Which kernel runs is decided when they run, so a compiled model does not depend on the number of rows.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..format.bitmask import unpack
from ..utils.availability import TRITON
from ..utils.validation import check_choice
from . import cpu as native
from .reference import reference_linear
from .support_index import index_of, row_starts
from .tensor_cache import keep

logger = logging.getLogger(__name__)

KERNELS = ("auto", "packed", "dense")
VARIABLE = "HF_SPARSELR_KERNEL"
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_Optional = torch.Tensor | None


@torch.library.custom_op("hf_sparselr::linear", mutates_args=())
def linear(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    A: _Optional,
    B: _Optional,
    bias: _Optional,
    in_features: int,
    kernel: str,
) -> torch.Tensor:
    """`product` as an operator."""
    return product(inputs, mask, values, A, B, bias, in_features, kernel)


@linear.register_fake
def _(inputs, mask, values, A, B, bias, in_features, kernel):
    return inputs.new_empty((*inputs.shape[:-1], mask.shape[0]))


@torch.library.custom_op("hf_sparselr::linears", mutates_args=())
def linears(
    inputs: torch.Tensor,
    masks: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    A: Sequence[_Optional],
    B: Sequence[_Optional],
    biases: Sequence[_Optional],
    in_features: int,
    kernel: str,
) -> list[torch.Tensor]:
    """`products` as an operator."""
    return products(inputs, list(zip(masks, values, A, B, biases, strict=True)), in_features, kernel)


@linears.register_fake
def _(inputs, masks, values, A, B, biases, in_features, kernel):
    return [inputs.new_empty((*inputs.shape[:-1], mask.shape[0])) for mask in masks]


def _setting(kernel: str) -> str:
    kernel = os.environ.get(VARIABLE, kernel)
    check_choice("kernel", kernel, KERNELS)
    return kernel


def _uses_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and TRITON and tensor.dtype in _TRITON_DTYPES


def _on_its_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(tensor)


def product(inputs, mask, values, A, B, bias, in_features, kernel) -> torch.Tensor:
    """x S^T + (x A^T) B^T + bias: (..., in) to (..., out), by the fastest way."""
    return products(inputs, [(mask, values, A, B, bias)], in_features, kernel)[0]


def products(inputs, layers, in_features, kernel) -> list[torch.Tensor]:
    """`product` for several layers, each (mask, values, A, B, bias), in as few launches as may be."""
    rows, kernel = inputs.reshape(-1, in_features), _setting(kernel)
    empty = rows.numel() == 0 or not all(mask.shape[0] for mask, *_ in layers)
    with _on_its_device(rows):
        if empty or kernel == "dense" or not _uses_triton(rows):
            outs = [_product(rows, *layer, in_features, kernel) for layer in layers]
        else:
            from .triton.decode import Packed
            from .triton.product import triton_product

            outs = triton_product(rows, [Packed.of(*layer, in_features) for layer in layers], kernel)
    return [out.view(*inputs.shape[:-1], out.shape[1]) for out in outs]


def _product(rows, mask, values, A, B, bias, in_features, kernel) -> torch.Tensor:
    if rows.numel() == 0 or not len(mask):
        return rows.new_zeros((len(rows), len(mask))) if bias is None else bias.repeat(len(rows), 1)
    if kernel == "dense":
        return F.linear(rows, _resident(mask, values, A, B, in_features), bias)
    if len(rows) == 1 and native.takes(rows, mask, values) and native.supports(values.dtype):
        return native.multiply(rows[0], mask, values, A, B, bias, row_starts(mask))[None]
    return reference_linear(rows, mask, values, A, B, bias, in_features)


def _resident(mask, values, A, B, in_features) -> torch.Tensor:
    def build() -> torch.Tensor:
        _say_dense_once()
        return _dense(mask, values, A, B, in_features)

    return keep("dense", (mask, values, A, B), build)


@functools.cache
def _say_dense_once() -> None:
    logger.warning("kernel='dense': S + B A of the packed layers stays in memory beside the packed form")


def _dense(mask, values, A, B, in_features) -> torch.Tensor:
    """S + B A as a new tensor."""
    if _uses_triton(values):
        from .triton.unpack import densify

        return densify(mask, index_of(mask, in_features), values, A, B)
    dense = unpack(mask, values, in_features)
    return dense if A is None else dense + B @ A


@torch.library.custom_op("hf_sparselr::input_gradient", mutates_args=())
def input_gradient(
    grad: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    A: _Optional,
    B: _Optional,
    in_features: int,
    kernel: str,
) -> torch.Tensor:
    """grad (S + B A): (..., out) to (..., in)."""
    build = _resident if _setting(kernel) == "dense" else _dense
    with _on_its_device(grad):
        return grad @ build(mask, values, A, B, in_features)


@input_gradient.register_fake
def _(grad, mask, values, A, B, in_features, kernel):
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.custom_op("hf_sparselr::value_gradient", mutates_args=())
def value_gradient(
    grad: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor, nonzeros: int
) -> torch.Tensor:
    """grad^T x on the support: (rows, out), (rows, in) to (nonzeros,)."""
    from .triton.unpack import collect

    with _on_its_device(grad):
        return collect(mask, index_of(mask, inputs.shape[1]), grad.T @ inputs)


@value_gradient.register_fake
def _(grad, inputs, mask, nonzeros):
    return grad.new_empty(nonzeros)


def _save(ctx, inputs, output) -> None:
    x, mask, values, A, B, _, ctx.in_features, ctx.kernel = inputs
    trains = any(tensor is not None and tensor.requires_grad for tensor in (values, A, B))
    ctx.save_for_backward(x if trains else None, mask, values, A, B)


def _backward(ctx, grad):
    x, mask, values, A, B = ctx.saved_tensors
    need = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    inputs = None if x is None else x.reshape(-1, ctx.in_features)
    return (
        input_gradient(grad, mask, values, A, B, ctx.in_features, ctx.kernel) if need[0] else None,
        None,
        value_gradient(rows, inputs, mask, values.shape[0]) if need[2] else None,
        (rows @ B).T @ inputs if need[3] else None,
        rows.T @ (inputs @ A.T) if need[4] else None,
        rows.sum(0) if need[5] else None,
        None,
        None,
    )


linear.register_autograd(_backward, setup_context=_save)
