"""3BASiL's iteration as published (arXiv 2603.01376, section 3): the form to reproduce and to compare with.

Every step computes the dense copy (G + rho I)^-1 (G (Wt - L) - V + rho D) by two large FP32 products. Every new rho
takes a new factorisation of G + rho I. The low-rank block comes in closed form from the singular vectors of E G^(1/2).
`admm` reaches the same fixed points with one product a step.
"""

from collections.abc import Iterator

import torch

from ...format.patterns import Pattern, project
from ..base import exact_basis
from ..gram import ScaledGram


class TextbookAdmm:
    """The interface of `admm.Admm`, for a single layer."""

    precision = "fp32"

    def __init__(self, weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, rho: float) -> None:
        self.W, self.gram, self.pattern, self.rank = weight, gram, pattern, rank
        self.kept = pattern.kept(weight.shape)
        self.basis = None
        self.restart(rho)

    def restart(self, rho: float) -> None:
        """D = project(Wt), V = 0, L = 0."""
        self.rho, self.inverse = rho, self.gram.inverse(rho)
        self.D, self.mask = project(self.W, self.pattern)
        self.V, self.L = torch.zeros_like(self.W), torch.zeros_like(self.W)

    def raise_rho(self, factor: float) -> None:
        """Multiplies the penalty; V does not change."""
        self.rho *= factor
        self.inverse = self.gram.inverse(self.rho)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def changed(self, before: torch.Tensor) -> float:
        return int((self.mask != before).sum()) / max(self.kept, 1)

    def result(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yields (D, mask, basis)."""
        yield self.D, self.mask, self.basis

    def _step(self) -> None:
        copy = ((self.W - self.L) @ self.gram.matrix - self.V + self.rho * self.D) @ self.inverse
        if self.rank:
            error = self.W - copy
            self.basis = exact_basis(error, self.gram, self.rank)
            self.L = self.basis @ (self.basis.T @ error)
        self.D, self.mask = project(copy + self.V / self.rho, self.pattern)
        self.V = self.V + self.rho * (copy - self.D)
