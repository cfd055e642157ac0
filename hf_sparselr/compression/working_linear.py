"""A layer S + B A in FP32 while its block, or the whole model, is trained."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..format.bitmask import unpack, unpack_mask
from ..format.decomposition import Decomposition
from ..nn.hierarchical import HierarchicalLowRank
from ..nn.linear import SparseLRLinear


class WorkingLinear(nn.Module):
    """S + B A of one layer in FP32.

    S is dense with zeros. Its gradient is masked, so Adam never moves an entry outside the support.

    Args:
        decomposition: of the layer; its tensors become parameters.
        bias: (out,) or None.
        transposed: whether the layer it stands for stored its weight as (in, out).

    Attributes:
        rounded: a `rounded_weights.RoundedWeight` that multiplies in its place, or None.
    """

    rounded: Any = None

    def __init__(self, decomposition: Decomposition, bias: torch.Tensor | None, transposed: bool = False) -> None:
        super().__init__()
        # Contiguous: a run that goes on reads them from a file, and the same product has the same bits.
        self.S = nn.Parameter(decomposition.S.contiguous())
        self.A = None if decomposition.A is None else nn.Parameter(decomposition.A.contiguous())
        self.B = None if decomposition.B is None else nn.Parameter(decomposition.B.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float())
        self.hierarchy = None
        if decomposition.hierarchy is not None:
            self.hierarchy = HierarchicalLowRank.from_hierarchy(decomposition.hierarchy, torch.float32)
        self.transposed = transposed
        self.register_buffer("mask", decomposition.mask)
        owner = weakref.ref(self)  # in a cycle, S would wait for the garbage collector
        self.S.register_hook(lambda grad: grad * owner().mask)

    @classmethod
    def from_packed(cls, layer: SparseLRLinear) -> "WorkingLinear":
        """The layer that was packed, with the values that are stored."""
        mask = unpack_mask(layer.mask, layer.in_features)
        S = unpack(layer.mask, layer.values, layer.in_features)
        factors = (None, None) if layer.A is None else (layer.A.data, layer.B.data)
        hierarchy = None if layer.hierarchy is None else layer.hierarchy.detached()
        parts = Decomposition(S.data, mask, *factors, hierarchy=hierarchy)
        return cls(parts, layer.bias, layer.transposed)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.rounded is not None:
            return self.rounded.product(inputs, self.bias)
        return F.linear(inputs, self.weight, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """S + B A, (out, in), FP32. Some blocks read it, such as T5's."""
        return self.whole_weight() if self.rounded is None else self.rounded.read()

    def whole_weight(self) -> torch.Tensor:
        """S + B A, (out, in). With as many inputs as training has, it is cheaper than two thin products."""
        flat = self.S if self.A is None else self.S + self.B @ self.A
        return flat if self.hierarchy is None else flat + self.hierarchy.dense()

    @property
    def factors(self) -> list[nn.Parameter]:
        """A and B, and what trains of the hierarchical part."""
        flat = [] if self.A is None else [self.A, self.B]
        return flat if self.hierarchy is None else flat + self.hierarchy.factors

    def decomposition(self) -> Decomposition:
        """The trained parts, without gradient."""
        factors = (None, None) if self.A is None else (self.A.detach(), self.B.detach())
        hierarchy = None if self.hierarchy is None else self.hierarchy.detached()
        return Decomposition(self.S.detach(), self.mask, *factors, hierarchy=hierarchy)

    def pack(self, dtype: torch.dtype) -> SparseLRLinear:
        """The packed layer in the dtype in which it is stored."""
        return SparseLRLinear.from_decomposition(
            self.decomposition(), self.bias, transposed=self.transposed, dtype=dtype
        )


def trainable(module: nn.Module, fixed: frozenset[str] = frozenset()) -> dict[str, list[nn.Parameter]]:
    """The parameters that refinement trains: "S" and "factors" of `WorkingLinear`, and "vectors" (norms, biases).

    Args:
        fixed: names of parameters that are not trained.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, WorkingLinear)]
    return {
        "S": [layer.S for layer in layers],
        "factors": [factor for layer in layers for factor in layer.factors],
        "vectors": [
            parameter
            for name, parameter in module.named_parameters()
            if parameter.ndim == 1 and parameter.is_floating_point() and name not in fixed
        ],
    }
