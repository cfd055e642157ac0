"""3BASiL (arXiv 2603.01376, section 3): a 3-block ADMM finds the support of S, a refit its weights and B A.

`admm` holds the iteration. This file holds the schedule of the penalty, the stopping rule and the refit. The room's
NOTES.md has the measurements behind the schedules.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...format.decomposition import Decomposition
from ...format.patterns import Pattern
from ...utils.phase_timer import PhaseTimer
from ...utils.precision import LEVELS, PRECISIONS, matmuls
from ...utils.validation import check_choice, check_integer, check_number, check_numbers
from ...utils.world import ALONE, World
from ..base import scaled, subspace_iteration_step, unscale
from ..gram import ScaledGram, squared_error
from .admm import Admm
from .textbook import TextbookAdmm

MAX_RESTARTS = 3
MAX_RHO = 1e9  # for a Gram matrix with unit diagonal; nothing moves far below it
SETTLED = 1e-4  # share of the objective: a refit round that gains less is the last one


@dataclass(frozen=True)
class Options:
    """Options of `method="3basil"`; the defaults are the published schedule.

    Attributes:
        form: of the iteration: "one-product" (see `admm`), or "textbook", as published (see `textbook`).
        rho: first penalty, for a Gram matrix with unit diagonal.
        check_every: iterations between two looks at the support.
        growth: factors for rho when the support changed by more than `thresholds[0]`, by more than `thresholds[1]`, or
            by less.
        thresholds: changed entries / kept entries since the previous look.
        tolerance: the iteration stops once the change is below this share and `min_iterations` have run.
        min_iterations: see `tolerance`.
        max_iterations: stop here in any case; `stats["converged"]` is then False.
        refit_rounds: most rounds of (low-rank fit, conjugate gradients on the fixed support) at the end. A round that
            lowers the objective by less than 1e-4 of it is the last.
        cg_steps: conjugate gradient steps per round.
        precision: of the large products: "bf16" (with FP32 sums), "tf32" (GPUs only), "fp32" or "auto". "auto" takes
            the coarsest one whose rounding does not show in the objective.
        weigh_outputs: count the squared error of each output by how strongly the block's output depends on it. The
            low-rank part, and unstructured supports, then go where errors do most harm.
    """

    form: str = "one-product"
    rho: float = 0.1
    check_every: int = 10
    growth: tuple[float, float, float] = (1.1, 1.05, 1.02)
    thresholds: tuple[float, float] = (0.1, 0.005)
    tolerance: float = 3e-4
    min_iterations: int = 100
    max_iterations: int = 1000
    refit_rounds: int = 10
    cg_steps: int = 5
    precision: str = "auto"
    weigh_outputs: bool = False

    def __post_init__(self) -> None:
        for name in ("rho", "tolerance"):
            check_number(f"method_options.{name}", getattr(self, name), 0, exclusive=True)
        for name in ("check_every", "min_iterations", "max_iterations", "cg_steps"):
            check_integer(f"method_options.{name}", getattr(self, name), 1)
        check_integer("method_options.refit_rounds", self.refit_rounds, 0)
        check_choice("method_options.form", self.form, ("one-product", "textbook"))
        check_choice("method_options.weigh_outputs", self.weigh_outputs, (True, False))
        check_choice("method_options.precision", self.precision, ("auto", *PRECISIONS))
        # JSON gives lists
        object.__setattr__(self, "growth", check_numbers("method_options.growth", self.growth, 3, 1.0))
        object.__setattr__(self, "thresholds", check_numbers("method_options.thresholds", self.thresholds, 2, 0.0))
        if self.max_iterations < self.min_iterations:
            raise ValueError(
                f"method_options.max_iterations={self.max_iterations}: expected at least "
                f"method_options.min_iterations={self.min_iterations}"
            )


def solve(
    weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int = 0
) -> Decomposition:
    """Decomposes one layer; see `registry.Solve`. The seed draws the first low-rank basis.

    Returns:
        The best iterate, with `stats`: iterations, converged, rho, precision, objective (scaled tr(E G E^T), damped)
        and phases (seconds).
    """
    return solve_group([weight], gram, [pattern], [rank], options, seed)[0]


def solve_group(
    weights: list[torch.Tensor],
    gram: ScaledGram,
    patterns: list[Pattern],
    ranks: list[int],
    options: Options,
    seed: int = 0,
    world: World = ALONE,
) -> list[Decomposition]:
    """`solve` for layers with a common input: they share products, penalty and stopping.

    Args:
        world: the processes that share the rows of every layer; all have the same arguments, and get the same results.
    """
    scaled_weights = [scaled(weight, gram) for weight in weights]
    results = []
    for Wt, (S, mask, basis, stats) in zip(
        scaled_weights, decompose(scaled_weights, gram, patterns, ranks, options, seed, world=world), strict=True
    ):
        result = unscale(S, mask, basis, Wt[world.rows(len(Wt))] - S, gram, world)
        for name in ("S", "mask") if basis is None else ("S", "mask", "B"):
            setattr(result, name, world.all_rows(getattr(result, name), len(Wt)))
        result.stats = stats
        results.append(result)
    return results


def shares_rows(options: Options) -> bool:
    """Whether `solve_group` takes several processes."""
    return options.form != "textbook"


def decompose(
    weights: list[torch.Tensor],
    gram: ScaledGram,
    patterns: list[Pattern],
    ranks: list[int],
    options: Options,
    seed: int,
    admm: Admm | None = None,
    world: World = ALONE,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict]]:
    """`solve_group` in scaled coordinates.

    Args:
        weights: Wt (out_i, in) of every layer.
        admm: an iteration on weights of the same shapes, patterns and ranks, to be used again with its CUDA graphs.
        world: the processes that share the rows of every layer.

    Yields:
        (S, mask, basis, stats) of every layer, where B A is basis @ (basis^T (Wt - S)): the rows of this process.
    """
    if options.form == "textbook" and len(weights) > 1:
        for Wt, pattern, rank in zip(weights, patterns, ranks, strict=True):
            yield from decompose([Wt], gram, [pattern], [rank], options, seed)
        return
    phases = PhaseTimer(gram.matrix.device, memory=False)
    with phases("factorisation"):
        if admm is not None:
            admm.retarget(weights, options.rho)
        elif options.form == "textbook":
            admm = TextbookAdmm(weights[0], gram, patterns[0], ranks[0], options.rho)
        else:
            admm = Admm(weights, gram, patterns, ranks, options.rho, seed, options.precision, world)
    stats = iterate(admm, options, phases)
    layers, level = list(admm.result()), LEVELS[admm.precision]
    shared = {name: seconds / len(layers) for name, seconds in phases.seconds.items()}
    del admm
    for Wt, (D, mask, basis) in zip(weights, layers, strict=True):
        own = Wt[world.rows(len(Wt))]
        phases = PhaseTimer(gram.matrix.device, memory=False)
        with phases("refit"), matmuls(level):
            S, basis = _refit(own, D, mask, basis, gram.matrix, options, world)
            E = own - S
            E = E if basis is None else E - basis @ world.sum_(basis.T @ E)
            objective = world.total(squared_error(E, gram.matrix), E.device)
        yield S, mask, basis, {**stats, "objective": objective, "phases": {**shared, **phases.seconds}}


def iterate(admm: Admm | TextbookAdmm, options: Options, phases: PhaseTimer) -> dict:
    """Runs steps under the schedule of `options` until the support stands still; returns stats."""
    last_mask, raised, restarts, iteration = admm.mask.clone(), False, 0, 0
    while iteration < options.max_iterations:
        steps = min(options.check_every, options.max_iterations - iteration)
        with phases("ADMM"):
            admm.run(steps)
        iteration += steps
        change = admm.changed(last_mask)
        last_mask.copy_(admm.mask)
        if iteration >= options.min_iterations and change < options.tolerance:
            break
        if change == 0 and not raised and restarts < MAX_RESTARTS:
            restarts += 1
            admm.restart(admm.rho / 5)  # the penalty is so stiff that nothing moves
            continue
        level = 0 if change > options.thresholds[0] else 1 if change > options.thresholds[1] else 2
        if admm.rho < MAX_RHO:
            with phases("factorisation"):
                admm.raise_rho(min(options.growth[level], MAX_RHO / admm.rho))
        raised = True
    converged = change < options.tolerance and iteration >= options.min_iterations
    return {"iterations": iteration, "converged": converged, "rho": admm.rho, "precision": admm.precision}


def _refit(Wt, S, mask, basis, G, options: Options, world: World = ALONE):
    """Alternates the low-rank fit given S and conjugate gradients on S given its support; keeps the best."""
    last, L = math.inf, torch.zeros_like(Wt)
    for round_ in range(options.refit_rounds + 1):
        if round_:
            S = refine_on_support(S, Wt - L, mask, G, options.cg_steps)
        E = Wt - S
        if basis is not None:
            basis = subspace_iteration_step(E, G, basis, world)
            L = basis @ world.sum_(basis.T @ E)
        objective = world.total(squared_error(E - L, G), E.device)
        if round_ and not objective < last:
            break
        best, gained, last = (S, basis), last - objective, objective
        if gained < SETTLED * objective:
            break
    return best


def refine_on_support(
    S: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, G: torch.Tensor, steps: int
) -> torch.Tensor:
    """Conjugate gradient steps on min tr((target - S) G (target - S)^T) over the entries in `mask`.

    Rows are independent problems, so each has its own step sizes. G has a unit diagonal, so the Jacobi preconditioner
    is the identity. A row stops once its direction has no curvature beyond rounding.

    Args:
        S: (out, in) start, zero outside the mask.
        target: (out, in).
        mask: (out, in) bool.
        G: (in, in), unit diagonal.
        steps: CG steps.

    Returns:
        (out, in), zero outside the mask.
    """
    precision = torch.finfo(S.dtype)
    rounding = precision.eps * len(G) ** 0.5
    residual = ((target - S) @ G) * mask
    direction = residual
    norm = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ G) * mask
        curvature = (direction * curved).sum(1, keepdim=True)
        flat = curvature <= rounding * direction.square().sum(1, keepdim=True)  # singular G, or converged
        alpha = (norm / curvature.clamp(min=precision.tiny)).masked_fill(flat, 0.0)
        S = S + alpha * direction
        residual = residual - alpha * curved
        next_norm = residual.square().sum(1, keepdim=True)
        direction = residual + (next_norm / norm.clamp(min=precision.tiny)) * direction
        norm = next_norm
    return S
