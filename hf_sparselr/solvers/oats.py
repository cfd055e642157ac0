"""OATS (arXiv 2409.13652): alternating thresholding of W D, D the root mean square of the inputs.

It minimises ||(W - S - L) D||_F with D = sqrt(diag(X^T X)). Algorithm 1 repeats two steps 80 times: L is the truncated
SVD of W D - S, then S is the hard threshold of W D - L. At the end both are divided by D. OATS thus sees only the
diagonal of the Gram matrix; D is `gram.scale` here, damped as for the other methods. As published, the result is the
last iterate: S is the threshold of W D - L, and L is not fitted to S afterwards.

The published code computes a full SVD in every iteration. `svd="subspace"` takes one step of subspace iteration from
the previous basis instead (NOTES.md compares them).
"""

import math
from dataclasses import dataclass

import torch

from ..format.decomposition import Decomposition
from ..format.patterns import COMPARE, Pattern, compared_mask
from ..utils.validation import check_choice, check_integer
from .alternating import settled
from .base import left_singular_vectors, scaled, unscale
from .gram import ScaledGram, squared_error


@dataclass(frozen=True)
class Options:
    """Options of `method="oats"`.

    Attributes:
        iterations: of the alternation.
        compare: where entries compete under an unstructured pattern: "row" (the paper's choice) or "layer". Under N:M
            they compete within groups.
        svd: "subspace" (one warm-started step of subspace iteration) or "exact".
    """

    iterations: int = 80
    compare: str = "row"
    svd: str = "subspace"

    def __post_init__(self) -> None:
        check_integer("method_options.iterations", self.iterations, 1)
        check_choice("method_options.compare", self.compare, COMPARE)
        check_choice("method_options.svd", self.svd, ("subspace", "exact"))


def solve(
    weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int = 0
) -> Decomposition:
    """Decomposes one layer; see `registry.Solve`. Nothing is random: the seed is not used.

    Returns:
        The last iterate, with `stats`: iterations, scaled_error = ||(W - S - L) D||_F^2, converged (the last iteration
        changed scaled_error by at most a thousandth), objective.
    """
    Wt = scaled(weight, gram)
    S, L, basis, errors = torch.zeros_like(Wt), 0.0, None, [math.inf]
    iterations = options.iterations if rank else 1
    for _ in range(iterations):
        E = Wt - S
        if rank:
            basis = _basis(E, basis if options.svd == "subspace" else None, rank)
            L = basis @ (basis.T @ E)
        target = Wt - L
        mask = compared_mask(target.abs(), pattern, options.compare)
        S = target * mask
        errors.append((target - S).square().sum(dtype=torch.float64))  # read at the end: nothing waits for it
    last, error = map(float, errors[-2:])
    result = unscale(S, mask, basis, E, gram)
    objective = squared_error(target - S, gram.matrix)
    result.stats = {
        "iterations": iterations,
        "converged": not rank or settled(last, error),
        "scaled_error": error,
        "objective": objective,
    }
    return result


def _basis(error: torch.Tensor, basis: torch.Tensor | None, rank: int) -> torch.Tensor:
    """Leading left singular vectors of the error (out, rank): exact, or one step on from the previous basis."""
    if basis is None:
        return left_singular_vectors(error, rank)
    return torch.linalg.qr(error @ (error.T @ basis)).Q
