"""The packed product as torch operators: opaque to torch.compile (no graph breaks), safe in CUDA graphs.

Which kernel runs is decided when they run, so a compiled model does not depend on the number of rows.
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..utils.availability import TRITON
from . import cpu
from .bindings import ON_CPU, Binding, Product, binding_of, tensors_of
from .override import chosen_kernel
from .packed_weight import PackedWeight, check_inputs
from .reference import count_values, dense_weight, no_product, reference_linear
from .resident import resident_weight
from .support_index import index_of

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
    return product(inputs, PackedWeight(mask, values, A, B, bias, in_features), kernel)


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
    parts = zip(masks, values, A, B, biases, strict=True)
    return products(inputs, [PackedWeight(*part, in_features) for part in parts], chosen_kernel(kernel))


@linears.register_fake
def _(inputs, masks, values, A, B, biases, in_features, kernel):
    return [inputs.new_empty((*inputs.shape[:-1], mask.shape[0])) for mask in masks]


def products(
    inputs: torch.Tensor,
    weights: Sequence[PackedWeight],
    kernel: str,
    tensors: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """x S^T + (x A^T) B^T + bias of every weight, (..., in) to (..., out), in as few launches as may be.

    Args:
        inputs: x, in memory of the CPU or a CUDA device.
        weights: of one width.
        kernel: "auto", "packed" or "dense".
        tensors: `bindings.tensors_of` the weights, if they are at hand.

    Raises:
        ValueError, TypeError: weights or inputs that do not fit together.
    """
    if tensors is None:
        tensors = tensors_of(weights)
    binding = binding_of(weights, tensors)
    if not binding.fits(inputs):
        for weight in weights:
            check_inputs(inputs, weight)
    if kernel != "dense" and inputs.numel():
        if inputs.is_cpu:
            count = inputs.numel() // binding.in_features
            if product := _product_in_c(inputs, count, weights, binding, tensors):
                return product(inputs.contiguous(), count, weights)
        elif _uses_triton(inputs):
            return _gpu().multiply(inputs, weights, binding, kernel)
    rows = inputs.reshape(-1, binding.in_features)
    outs = [_product(rows, weight, kernel) for weight in weights]
    return [out.view(*inputs.shape[:-1], out.shape[1]) for out in outs]


def product(inputs: torch.Tensor, weight: PackedWeight, kernel: str) -> torch.Tensor:
    """`products` of one weight."""
    return products(inputs, (weight,), chosen_kernel(kernel))[0]


@functools.cache
def _gpu() -> ModuleType:
    """Only with Triton."""
    from . import gpu

    return gpu


def _uses_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and TRITON and tensor.dtype in _TRITON_DTYPES


def _product(rows: torch.Tensor, weight: PackedWeight, kernel: str) -> torch.Tensor:
    if rows.numel() == 0 or not weight.out_features:
        return no_product(rows, weight)
    if kernel == "dense":
        return F.linear(rows, resident_weight(weight, unpacked), weight.bias)
    if cpu.takes((rows, *weight.tensors)) and cpu.supports(rows.dtype):
        return cpu.unpack_then_gemm(rows, weight)
    return reference_linear(rows, weight)


def _product_in_c(
    inputs: torch.Tensor, rows: int, weights: Sequence[PackedWeight], binding: Binding, tensors: list[torch.Tensor]
) -> Product | None:
    """The C kernel's product of weights, bound before or now; None where something else computes it."""
    if not (cpu.prefers(inputs.dtype, rows) and cpu.takes((inputs, *tensors)) and cpu.supports(inputs.dtype)):
        return None
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        plain = [weight.contiguous() for weight in weights]
        return functools.partial(_keeping, cpu.bind(plain), plain)
    program = binding.products.get(ON_CPU)
    if program is None:
        binding.products[ON_CPU] = program = cpu.bind(weights)
    return program


def _keeping(
    product: Product, plain: Sequence[PackedWeight], inputs: torch.Tensor, rows: int, weights: Sequence[PackedWeight]
) -> list[torch.Tensor]:
    """A product whose weights nothing else keeps alive."""
    return product(inputs, rows, plain)


def unpacked(weight: PackedWeight) -> torch.Tensor:
    """S + B A as a new tensor (out, in)."""
    if not _uses_triton(weight.values):
        count_values(weight)
        return dense_weight(weight)
    return _gpu().densify(weight)


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
    """`_input_gradient` as an operator."""
    return _input_gradient(grad, PackedWeight(mask, values, A, B, None, in_features), kernel)


@input_gradient.register_fake
def _(grad, mask, values, A, B, in_features, kernel):
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.custom_op("hf_sparselr::value_gradient", mutates_args=())
def value_gradient(grad: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor, nonzeros: int) -> torch.Tensor:
    """`_value_gradient` as an operator."""
    return _value_gradient(grad, inputs, mask)


@value_gradient.register_fake
def _(grad, inputs, mask, nonzeros):
    return grad.new_empty(nonzeros)


def _save(ctx, inputs, output) -> None:
    x, mask, values, A, B, _, ctx.in_features, ctx.kernel = inputs
    trains = any(tensor is not None and tensor.requires_grad for tensor in (values, A, B))
    ctx.save_for_backward(x if trains else None, mask, values, A, B)


def _backward(ctx, grad):
    x, mask, values, A, B = ctx.saved_tensors
    weight = PackedWeight(mask, values, A, B, None, ctx.in_features)

    def of_input(grad: torch.Tensor) -> torch.Tensor:
        return input_gradient(grad, *weight[:4], ctx.in_features, ctx.kernel)

    def of_values(rows: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return value_gradient(rows, inputs, mask, values.shape[0])

    return _gradients(ctx.needs_input_grad, grad, x, weight, of_input, of_values)


def _gradients(
    need: Sequence[bool],
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: PackedWeight,
    of_input: Callable[[torch.Tensor], torch.Tensor],
    of_values: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple:
    """Those of the arguments of `linear` that are needed. x (..., in) is there if one of them takes it."""
    rows = grad.reshape(-1, grad.shape[-1])
    inputs = None if x is None else x.reshape(-1, weight.in_features)
    return (
        of_input(grad) if need[0] else None,
        None,
        of_values(rows, inputs) if need[2] else None,
        (rows @ weight.B).T @ inputs if need[3] else None,
        rows.T @ (inputs @ weight.A.T) if need[4] else None,
        rows.sum(0) if need[5] else None,
        None,
        None,
    )


linear.register_autograd(_backward, setup_context=_save)


def _input_gradient(grad: torch.Tensor, weight: PackedWeight, kernel: str) -> torch.Tensor:
    """grad (S + B A): (..., out) to (..., in)."""
    if chosen_kernel(kernel) == "dense":
        return grad @ resident_weight(weight, unpacked)
    return _gpu().input_gradient(grad, weight) if _uses_triton(grad) else grad @ unpacked(weight)


def _value_gradient(grad: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """grad^T x on the support: (rows, out), (rows, in) to (nonzeros,)."""
    from .triton.unpack import collect

    with torch.cuda.device_of(grad):
        return collect(mask, index_of(mask, inputs.shape[1]), grad.T @ inputs)


class Differentiable(torch.autograd.Function):
    """`linear` where no compiler and no mode looks on: an operator takes the host several times as long.

    The last argument is a `LayerCalls` of the layer, or None.
    """

    @staticmethod
    def forward(ctx, inputs, mask, values, A, B, bias, in_features, kernel, calls):
        ctx.in_features, ctx.kernel, ctx.calls = in_features, kernel, calls
        trains = any(ctx.needs_input_grad[2:5])
        ctx.save_for_backward(inputs if trains else None, mask, values, A, B)
        weight = PackedWeight(mask, values, A, B, bias, in_features)

        return product(inputs, weight, kernel) if calls is None else calls.product(inputs, weight, kernel, product)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mask, values, A, B = ctx.saved_tensors
        weight = PackedWeight(mask, values, A, B, None, ctx.in_features)

        def of_input(grad: torch.Tensor) -> torch.Tensor:
            if ctx.calls is None:
                return _input_gradient(grad, weight, ctx.kernel)
            return ctx.calls.gradient(grad, weight, ctx.kernel, _input_gradient)

        of_values = functools.partial(_value_gradient, mask=mask)
        return *_gradients(ctx.needs_input_grad, grad, x, weight, of_input, of_values), None
