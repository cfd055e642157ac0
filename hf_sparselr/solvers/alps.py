"""ALPS (arXiv 2406.07831): ADMM on min tr((Wt - S) G (Wt - S)^T) finds the support, conjugate gradients the weights.

Algorithm 1 is the iteration of 3BASiL without a low-rank block. `threebasil.decompose` runs it under the schedule of
ALPS: rho grows every three iterations, by factors that depend on how much of the support moved. Algorithm 2, conjugate
gradients with the Jacobi preconditioner (the identity, because G has a unit diagonal), then refits the weights.

The paper stops once the support no longer changes. As in the authors' code, the iteration here also stops once less
than 0.03% of the support changed after 30 iterations; the refit makes up for the rest. If the support does not move at
all before rho was ever raised, the iteration restarts with a fifth of rho.
"""

from dataclasses import dataclass

import torch

from ..format.patterns import Pattern
from ..utils.validation import check_integer, check_number, check_numbers
from . import threebasil
from .base import Repeated, solve_by_pruning
from .gram import ScaledGram
from .threebasil.admm import Admm

MIN_ITERATIONS = 30


@dataclass(frozen=True)
class Options:
    """Options of `method="alps"`; the defaults are the published schedule.

    Attributes:
        rho: first penalty, for a Gram matrix with unit diagonal.
        check_every: iterations between two looks at the support, each of which raises rho.
        growth: factors for rho when more than 10%, more than 0.5% or less of the support changed.
        max_iterations: stop here in any case; `stats["converged"]` is then False.
        cg_steps: conjugate gradient steps on the final support.
    """

    rho: float = 0.1
    check_every: int = 3
    growth: tuple[float, float, float] = (1.3, 1.2, 1.1)
    max_iterations: int = 300
    cg_steps: int = 10

    def __post_init__(self) -> None:
        check_number("method_options.rho", self.rho, 0, exclusive=True)
        for name in ("check_every", "max_iterations", "cg_steps"):
            check_integer(f"method_options.{name}", getattr(self, name), 1)
        # JSON gives lists
        object.__setattr__(self, "growth", check_numbers("method_options.growth", self.growth, 3, 1.0))


def prune(
    Wt: torch.Tensor, gram: ScaledGram, pattern: Pattern, options: Options
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """See `pruners.Pruner.prune`. `stats` also holds the last rho and the precision of the large products."""
    schedule = _schedule(options)
    S, mask, _, stats = next(threebasil.decompose([Wt], gram, [pattern], [0], schedule, seed=0))
    return S, mask, stats


def repeated(gram: ScaledGram, pattern: Pattern, options: Options) -> Repeated:
    """See `pruners.Pruner.repeated`. One `Admm` serves all weights."""
    schedule, admm = _schedule(options), None

    def again(Wt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal admm
        if admm is None:
            admm = Admm([Wt.clone()], gram, [pattern], [0], schedule.rho, 0, schedule.precision)
        return next(threebasil.decompose([Wt], gram, [pattern], [0], schedule, seed=0, admm=admm))[:2]

    return again


def _schedule(options: Options) -> threebasil.Options:
    return threebasil.Options(
        rho=options.rho,
        check_every=options.check_every,
        growth=options.growth,
        min_iterations=min(MIN_ITERATIONS, options.max_iterations),
        max_iterations=options.max_iterations,
        refit_rounds=1,
        cg_steps=options.cg_steps,
    )


solve = solve_by_pruning("alps", prune)
