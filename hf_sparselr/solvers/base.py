"""What every solver takes and returns."""

from dataclasses import dataclass, field

import torch

from ..gram import ScaledGram


@dataclass
class Decomposition:
    """W ~ S + B A for one layer.

    Attributes:
        S: (out, in) FP32, zero outside `mask`.
        mask: (out, in) bool, the support.
        A: (rank, in) FP32, or None at rank 0.
        B: (out, rank) FP32, or None at rank 0.
        stats: what the solver did, JSON values only (`iterations`, `seconds` and so on).
    """

    S: torch.Tensor
    mask: torch.Tensor
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    stats: dict = field(default_factory=dict)

    def dense(self) -> torch.Tensor:
        """S + B A, (out, in)."""
        return self.S if self.A is None else self.S + self.B @ self.A


def range_step(error: torch.Tensor, gram: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """One step of subspace iteration on E G E^T.

    Its leading eigenvectors are the left singular vectors of E G^(1/2), so the exact G-weighted rank-r fit of E
    is P P^T E once the basis P has converged; no step increases the error of that fit.

    Args:
        error: E (out, in).
        gram: G (in, in).
        basis: P (out, r).

    Returns:
        (out, r), orthonormal columns.
    """
    return torch.linalg.qr(error @ (gram @ (error.T @ basis))).Q


def start_basis(
    error: torch.Tensor, gram: torch.Tensor, rank: int, seed: int, steps: int = 5
) -> torch.Tensor:
    """An (out, rank) orthonormal basis near the leading eigenvectors of E G E^T.

    A random sketch, the same for a seed on every device, and a few steps of subspace iteration.
    """
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(error.shape[1], rank, generator=generator).to(error.device)
    basis = torch.linalg.qr(error @ (gram @ sketch)).Q
    for _ in range(steps):
        basis = range_step(error, gram, basis)
    return basis


def balanced_factors(basis: torch.Tensor, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product basis @ coefficients with singular values split evenly: (A, B).

    Args:
        basis: (out, r), orthonormal columns.
        coefficients: (r, in).
    """
    U, sigma, Vh = torch.linalg.svd(coefficients, full_matrices=False)
    root = sigma.sqrt()
    return root[:, None] * Vh, basis @ (U * root)


def unscale(
    S: torch.Tensor, mask: torch.Tensor, basis: torch.Tensor | None, error: torch.Tensor, gram: ScaledGram
) -> Decomposition:
    """Back to the layer's own coordinates, with the low-rank part basis @ (basis^T error)."""
    alive = ~gram.dead / gram.scale
    S = S * alive
    if basis is None:
        return Decomposition(S, mask)
    A, B = balanced_factors(basis, (basis.T @ error) * alive)
    return Decomposition(S, mask, A, B)
