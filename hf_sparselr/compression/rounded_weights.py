"""BF16 copies of the weights S + B A, so that products in BF16 do not make them anew for every batch.

In a training step the gradient of a layer's whole weight is summed over the batches, in FP32. The gradients of S, A
and B are taken from it once a step.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..utils.precision import add_bf16_product, matmuls
from .working_linear import WorkingLinear


class RoundedWeight:
    """S + B A of a layer in BF16, and the sum of its gradients.

    Args:
        layer: without a hierarchical part if it is trained.
        trained: whether gradients are summed.
        casts: of the inputs, common to the layers of a module.
    """

    def __init__(self, layer: WorkingLinear, trained: bool, casts: "Casts") -> None:
        self._layer, self._casts = layer, casts
        self.weight = torch.empty_like(layer.S, dtype=torch.bfloat16, requires_grad=trained)
        self.gradient = torch.zeros_like(layer.S) if trained else None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the layer's present S, A and B."""
        with matmuls("high"):
            self.weight.copy_(self._layer.whole_weight())

    @torch.no_grad()
    def collect(self) -> None:
        """Gives S, A and B their gradients. The next step must begin with `clear`."""
        layer = self._layer
        if layer.A is not None:
            with matmuls("high"):
                layer.A.grad, layer.B.grad = layer.B.T @ self.gradient, self.gradient @ layer.A.T
        layer.S.grad = self.gradient.mul_(layer.mask)

    def clear(self) -> None:
        """Forgets the gradients of the last step."""
        self.gradient.zero_()

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's outputs (..., out) in BF16."""
        outputs = _Product.apply(self._casts(inputs), self.weight, self.gradient)
        return outputs if bias is None else outputs + bias.bfloat16()

    def read(self) -> torch.Tensor:
        """The weight in FP32, for blocks that read it."""
        return _Read.apply(self.weight, self.gradient)


class Casts:
    """The last inputs in BF16: layers that share inputs share their cast, and its gradient."""

    def __init__(self) -> None:
        self._clear()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs of any float dtype in BF16."""
        if inputs.dtype == torch.bfloat16:
            return inputs
        state = inputs._version, torch.is_grad_enabled()
        if self._inputs is None or self._inputs() is not inputs or self._state != state:
            self._cast, self._state = inputs.bfloat16(), state
            self._inputs = weakref.ref(inputs, self._clear)  # the cast ends with them
        return self._cast

    def _clear(self, _: Any = None) -> None:
        self._inputs = self._state = self._cast = None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.total = total
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        inputs, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        rows, columns = gradient.flatten(0, -2), inputs.flatten(0, -2)
        add_bf16_product(ctx.total, rows.T, columns)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        ctx.total = total
        return weight.float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        ctx.total += gradient
        return None, None


class RoundedWeights:
    """Those of all layers of a module."""

    def __init__(self, weights: list[RoundedWeight]) -> None:
        self._weights = weights

    def clear(self) -> None:
        for weight in self._weights:
            weight.clear()

    def collect(self) -> None:
        for weight in self._weights:
            weight.collect()

    def refresh(self) -> None:
        for weight in self._weights:
            weight.refresh()


@contextmanager
def rounded_weights(module: nn.Module, precision: str, trained: bool = False) -> Iterator[RoundedWeights]:
    """Inside, the layers of a module multiply by `RoundedWeight` if the products are in BF16.

    A layer that has one already keeps it.

    Args:
        precision: of the products, see `TMOptions`.
        trained: whether gradients are needed. Layers with a hierarchical part then stay as they are.
    """
    wanted = [
        layer
        for layer in module.modules()
        if isinstance(layer, WorkingLinear) and layer.rounded is None and not (trained and layer.hierarchy is not None)
    ]
    layers, casts = wanted if precision == "bf16" else [], Casts()
    try:
        for layer in layers:
            layer.rounded = RoundedWeight(layer, trained, casts)
        yield RoundedWeights([layer.rounded for layer in layers])
    finally:
        for layer in layers:
            layer.rounded = None
