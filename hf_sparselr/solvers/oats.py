"""OATS (arXiv 2409.13652): alternating thresholding of W D, D the root mean square of the inputs.

min ||(W - S - L) D||_F with D = sqrt(diag(X^T X)): L is the truncated SVD of W D - S, then S the hard threshold of
W D - L (Algorithm 1), 80 times; both are divided by D at the end. The error is measured with the diagonal of the Gram
matrix only, so D, up to a factor, is all that OATS sees of the inputs; it is `gram.scale` here, with the damping of
the other methods. As published, the result is the last iterate: S is the threshold of W D - L, L not a fit given S.

The published code takes a full SVD every time. One step of subspace iteration from the basis before does the same
(`svd="subspace"`): on four real layers the final error was that of the exact SVD to 1%, of either sign.
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
        iterations: of alternation.
        compare: where entries compete under an unstructured pattern, "row" (the paper's) or "layer". Under N:M
            they compete in groups, of which N are kept.
        svd: "subspace", one warm-started step of subspace iteration, or "exact".
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
    """Decomposes one layer; see `solvers.Solve`. Nothing is random: the seed is not used.

    Returns:
        The last iterate, with `stats`: iterations, converged (the last iteration changed OATS' own error by at most
        a thousandth), scaled_error = ||(W - S - L) D||_F^2, objective.
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
    """Leading left singular vectors of the error (out, rank): exact, or one step on from the last basis."""
    if basis is None:
        return left_singular_vectors(error, rank)
    return torch.linalg.qr(error @ (error.T @ basis)).Q
