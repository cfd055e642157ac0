"""The hierarchical low-rank part of a packed layer, as a module."""

from operator import itemgetter

import torch
from torch import nn

from ..format.hierarchy import FLOAT_PARTS, ORDER_PARTS, Hierarchy, HierarchyShape
from ..kernels.hierarchy import hierarchical_product

_PARTS = itemgetter(*FLOAT_PARTS, *ORDER_PARTS)


class HierarchicalLowRank(nn.Module):
    """y = x L^T for a hierarchical L (format/hierarchy.py).

    Attributes:
        shape: how L is split.
        A: (sum of ranks, in), B: (out, sum of ranks), leaves: (out, leaf columns), ranks: int32 (depth,).
        row_order: int32 (out,), column_order: int32 (in,), or both None.
    """

    A: nn.Parameter
    B: nn.Parameter
    leaves: nn.Parameter
    row_order: nn.Parameter | None
    column_order: nn.Parameter | None

    def __init__(
        self,
        shape: HierarchyShape,
        permuted: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape

        def frozen(part: str, dtype: torch.dtype | None) -> nn.Parameter:
            tensor = torch.empty(shape.sizes[part], device=device, dtype=dtype)
            return nn.Parameter(tensor, requires_grad=False)

        for part in FLOAT_PARTS:
            setattr(self, part, frozen(part, dtype))
        self.ranks = frozen("ranks", torch.int32)
        for part in ORDER_PARTS:
            self.register_parameter(part, frozen(part, torch.int32) if permuted else None)
        self._is_hf_initialized = True  # transformers must not draw random values for it

    @classmethod
    def from_hierarchy(cls, hierarchy: Hierarchy, dtype: torch.dtype | None = None) -> "HierarchicalLowRank":
        """A module with the floats of a hierarchy in `dtype` (default: as they are)."""
        module = cls(hierarchy.shape, hierarchy.row_order is not None, "meta")
        for part in FLOAT_PARTS:
            values = getattr(hierarchy, part).detach().to(dtype=dtype)
            setattr(module, part, nn.Parameter(values, requires_grad=False))
        ranks = torch.tensor(hierarchy.shape.ranks, dtype=torch.int32, device=hierarchy.A.device)
        module.ranks = nn.Parameter(ranks, requires_grad=False)
        for part in ORDER_PARTS:
            if (order := getattr(hierarchy, part)) is not None:
                setattr(module, part, nn.Parameter(order, requires_grad=False))
        return module

    @property
    def tensors(self) -> Hierarchy:
        """The module's own tensors."""
        if not torch.compiler.is_compiling():
            try:
                return Hierarchy(self.shape, *_PARTS(self._parameters))  # faster than a Module's attributes
            except KeyError:  # the copies of DataParallel have no parameters
                pass
        return Hierarchy(self.shape, self.A, self.B, self.leaves, self.row_order, self.column_order)

    @property
    def factors(self) -> list[nn.Parameter]:
        """The tensors that train: A, B and the leaves."""
        return [self.A, self.B, self.leaves]

    def detached(self) -> Hierarchy:
        """The tensors without their gradients."""
        orders = (None if order is None else order.detach() for order in (self.row_order, self.column_order))
        return Hierarchy(self.shape, *(factor.detach() for factor in self.factors), *orders)

    def forward(self, inputs: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., in) to (..., out); plus `base` (..., out), if there is one."""
        return hierarchical_product(inputs, self.tensors, base)

    def dense(self) -> torch.Tensor:
        """L, (out, in)."""
        return self.tensors.dense()

    def extra_repr(self) -> str:
        rows, columns = self.shape.leaf
        permuted = self.row_order is not None
        return f"ranks={list(self.shape.ranks)}, leaves={rows}x{columns}, permuted={permuted}"
