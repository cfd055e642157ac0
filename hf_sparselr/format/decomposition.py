"""S + B A of one layer, as tensors."""

from dataclasses import dataclass, field

import torch

from .hierarchy import Hierarchy


@dataclass
class Decomposition:
    """W ~ S + B A for one layer.

    Attributes:
        S: (out, in) FP32, zero outside `mask`.
        mask: (out, in) bool, the support.
        A: (rank, in) FP32, or None at rank 0.
        B: (out, rank) FP32, or None at rank 0.
        hierarchy: L (out, in), FP32, or None.
        stats: of the solver, JSON values only (`iterations`, `seconds` and so on).
    """

    S: torch.Tensor
    mask: torch.Tensor
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    stats: dict = field(default_factory=dict)
    hierarchy: Hierarchy | None = None

    def dense(self) -> torch.Tensor:
        """S + B A + L, (out, in)."""
        flat = self.S if self.A is None else self.S + self.B @ self.A
        return flat if self.hierarchy is None else flat + self.hierarchy.dense()

    def scale_rows_(self, factors: torch.Tensor) -> None:
        """Multiplies the rows of a decomposition without a hierarchy by factors (out, 1), in place."""
        self.S.mul_(factors)
        if self.B is not None:
            self.B.mul_(factors)
