"""3BASiL: a 3-block ADMM for S + B A (arXiv 2603.01376, section 3), with one large product per iteration.

The dense copy's update (G + rho I)^-1 (G (Wt - L) - V + rho D) is evaluated as R + (rho (D - R) - V) M with
R = Wt - L and M = (G + rho I)^-1, because M G = I - rho M: one m x n x n product, and a correction that is
small next to R. The low-rank block needs no SVD: the G-weighted fit is a projection from the left
(`range_step`), warm-started from the iteration before.
"""

import math
from dataclasses import dataclass

import torch

from ..checks import check_integer, check_number, check_numbers
from ..gram import ScaledGram, squared_error
from ..patterns import Pattern, project
from .base import Decomposition, range_step, start_basis, unscale

MAX_RESTARTS = 3


@dataclass(frozen=True)
class Options:
    """Options of `method="3basil"`; the defaults are the published schedule.

    Attributes:
        rho: first penalty, for a Gram matrix with unit diagonal.
        check_every: iterations between two looks at the support.
        growth: factors for rho when the support changed by more than `thresholds[0]`, more than
            `thresholds[1]`, or less.
        thresholds: changed entries / kept entries since the last look.
        tolerance: stop once the change is below this share ...
        min_iterations: ... and at least so many iterations have run.
        max_iterations: stop here in any case; `stats["converged"]` then is False.
        refit_rounds: rounds of (low-rank fit, CG on the fixed support) at the end.
        cg_steps: conjugate gradient steps a round.
    """

    rho: float = 0.1
    check_every: int = 10
    growth: tuple[float, float, float] = (1.1, 1.05, 1.02)
    thresholds: tuple[float, float] = (0.1, 0.005)
    tolerance: float = 3e-4
    min_iterations: int = 100
    max_iterations: int = 1000
    refit_rounds: int = 10
    cg_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("rho", "tolerance"):
            check_number(f"solver.{name}", getattr(self, name), 0, exclusive=True)
        for name in ("check_every", "min_iterations", "max_iterations", "cg_steps"):
            check_integer(f"solver.{name}", getattr(self, name), 1)
        check_integer("solver.refit_rounds", self.refit_rounds, 0)
        # JSON gives lists
        object.__setattr__(self, "growth", check_numbers("solver.growth", self.growth, 3, 1.0))
        object.__setattr__(self, "thresholds", check_numbers("solver.thresholds", self.thresholds, 2, 0.0))
        if self.max_iterations < self.min_iterations:
            raise ValueError(
                f"solver.max_iterations={self.max_iterations}: expected at least "
                f"solver.min_iterations={self.min_iterations}"
            )


def solve(
    weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int = 0
) -> Decomposition:
    """Decomposes one layer.

    Args:
        weight: W (out, in), any float dtype.
        gram: of the layer's inputs, on the same device.
        pattern: of S.
        rank: of B A, 0 for pure sparsity.
        options: see `Options`.
        seed: of the first low-rank basis.

    Returns:
        The best iterate, with `stats`: iterations, converged, rho, objective (scaled tr(E G E^T), damped).
    """
    Wt = (weight.float() * gram.scale).masked_fill_(gram.dead, 0.0)
    D, mask, L, basis, stats = _admm(Wt, gram, pattern, rank, options, seed)
    S, basis, error, objective = _refit(Wt, D, mask, L, basis, gram.matrix, options)
    result = unscale(S, mask, basis, error, gram)
    result.stats = {**stats, "objective": objective}
    return result


def _admm(Wt, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int):
    G = gram.matrix
    kept = pattern.kept(Wt.shape)
    rho, restarts = options.rho, 0
    D, mask, V, L = _start(Wt, pattern)
    basis = start_basis(Wt - D, G, rank, seed) if rank else None
    M = gram.inverse(rho)
    last_mask, raised, converged, iteration = mask, False, False, 0
    while iteration < options.max_iterations:
        iteration += 1
        R = Wt - L
        copy = R + (rho * (D - R) - V) @ M  # ADMM's dense copy of S
        T = copy + V / rho
        D, mask = project(T, pattern)
        V = rho * (T - D)
        if rank:
            E = Wt - copy
            basis = range_step(E, G, basis)
            L = basis @ (basis.T @ E)
        if iteration % options.check_every:
            continue
        change = int((mask != last_mask).sum()) / max(kept, 1)
        last_mask = mask
        if iteration >= options.min_iterations and change < options.tolerance:
            converged = True
            break
        if change == 0 and not raised and restarts < MAX_RESTARTS:
            rho, restarts = rho / 5, restarts + 1  # so stiff that nothing moves: start again, softer
            D, mask, V, L = _start(Wt, pattern)
        else:
            rho *= options.growth[
                0 if change > options.thresholds[0] else 1 if change > options.thresholds[1] else 2
            ]
            raised = True
        M = gram.inverse(rho)
    return D, mask, L, basis, {"iterations": iteration, "converged": converged, "rho": rho}


def _start(Wt, pattern: Pattern):
    D, mask = project(Wt, pattern)
    return D, mask, torch.zeros_like(Wt), torch.zeros_like(Wt)


def _refit(Wt, S, mask, L, basis, G, options: Options):
    """Alternates the low-rank fit given S and CG on S given its support: the objective never rises."""
    best = None
    for round_ in range(options.refit_rounds + 1):
        if round_:
            S = refine_on_support(S, Wt - L, mask, G, options.cg_steps)
        E = Wt - S
        if basis is not None:
            basis = range_step(E, G, basis)
            L = basis @ (basis.T @ E)
        objective = squared_error(E - L, G)
        if best is None or objective < best[-1]:
            best = (S, basis, E, objective)
        elif not math.isfinite(objective) or objective > best[-1] * (1 - 1e-6):
            break
    return best


def refine_on_support(
    S: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, G: torch.Tensor, steps: int
) -> torch.Tensor:
    """Conjugate gradient steps on min tr((target - S) G (target - S)^T) over the entries in `mask`.

    Rows are independent problems, so each has its own step sizes. G has unit diagonal: the Jacobi
    preconditioner is the identity.

    Args:
        S: (out, in) start, zero outside the mask.
        target: (out, in).
        mask: (out, in) bool.
        G: (in, in), unit diagonal.
        steps: CG steps.

    Returns:
        (out, in), zero outside the mask.
    """
    residual = ((target - S) @ G) * mask
    direction = residual
    norm = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ G) * mask
        alpha = norm / (direction * curved).sum(1, keepdim=True).clamp(min=torch.finfo(S.dtype).tiny)
        S = S + alpha * direction
        residual = residual - alpha * curved
        next_norm = residual.square().sum(1, keepdim=True)
        direction = residual + (next_norm / norm.clamp(min=torch.finfo(S.dtype).tiny)) * direction
        norm = next_norm
    return S
