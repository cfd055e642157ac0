"""Alternating minimisation over a sparse and a low-rank part: the loop of HASSLE-free and SSLC."""

import math
from collections.abc import Callable

import torch

from .gram import ScaledGram, squared_error

SETTLED = 1e-3  # relative change of the error

Prune = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Fit = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def alternate(
    Wt: torch.Tensor, gram: ScaledGram, rank: int, iterations: int, prune: Prune, fit: Fit
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict]:
    """Alternates S = prune(Wt - L) and L = P P^T (Wt - S), starting from L = 0; returns the iterate of least objective.

    Args:
        Wt: (out, in) FP32, scaled.
        gram: of the layer's inputs.
        rank: of L. At rank 0 there is nothing to alternate: one iteration is run.
        iterations: how many are run, at least 1.
        prune: Wt - L (out, in) -> S and its bool mask.
        fit: (Wt - S, the previous P or None at first) -> P (out, rank), orthonormal columns.

    Returns:
        (S, mask, P or None, stats), with stats iterations, converged (see `settled`), best_iteration, objective.
    """
    L, basis, last, best, least = 0.0, None, math.inf, None, math.inf
    for iteration in range(1, (iterations if rank else 1) + 1):
        S, mask = prune(Wt - L)
        E = Wt - S
        if rank:
            basis = fit(E, basis)
            L = basis @ (basis.T @ E)
        objective = squared_error(E - L, gram.matrix)
        if best is None or objective < least:
            best, least, best_iteration = (S, mask, basis), objective, iteration
        converged = not rank or settled(last, objective)
        last = objective
    stats = {"iterations": iteration, "converged": converged, "best_iteration": best_iteration}
    return *best, {**stats, "objective": least}


def settled(last: float, error: float) -> bool:
    """Whether an iteration changed the error by at most a thousandth."""
    return abs(last - error) <= SETTLED * error
