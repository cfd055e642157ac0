"""SSLC (arXiv 2510.26446): alternate a randomised SVD and pruning on the activation-weighted error.

It minimises ||X (W - S - L)^T||_F^2 with rank(L) <= r and a sparse S. The most important weights (1%) are never pruned.

The paper's summary leaves some choices open (NOTES.md has the measurements):
- The low-rank step weighs the error with the full Gram matrix.
- Pruning compares |Wt - L|, the Wanda score of the remainder, over the whole layer.
- The important weights are those with the largest scores |Wt| of the dense layer. They count towards the sparsity;
  under N:M at most N of a group can be kept.
- The best iterate is returned.
- Rank and sparsity are those of the layer; no budget is split between them.
- The randomised SVD sketches once, from the seed; later iterations start from the previous basis.
"""

from dataclasses import dataclass

import torch

from ..format.decomposition import Decomposition
from ..format.patterns import COMPARE, Pattern, compared_mask, top_mask
from ..utils.validation import check_choice, check_integer, check_number
from .alternating import alternate
from .base import randomized_range_finder, scaled, subspace_iteration_step, unscale
from .gram import ScaledGram


@dataclass(frozen=True)
class Options:
    """Options of `method="sslc"`.

    Attributes:
        iterations: of the alternation.
        important: share of the layer's weights, in [0, 1], that is never pruned.
        compare: where scores compete under an unstructured pattern: "layer" or "row".
    """

    iterations: int = 80
    important: float = 0.01
    compare: str = "layer"

    def __post_init__(self) -> None:
        check_integer("method_options.iterations", self.iterations, 1)
        check_number("method_options.important", self.important, 0, 1)
        check_choice("method_options.compare", self.compare, COMPARE)


def solve(
    weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int = 0
) -> Decomposition:
    """Decomposes one layer; see `registry.Solve`. The seed draws the sketch.

    Returns:
        The best iterate, with the `stats` of `alternate`.
    """
    Wt = scaled(weight, gram)
    importance = Wt.abs()
    important = top_mask(importance, int(options.important * Wt.numel()))

    def prune(target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = target.abs()
        first = scores.max() + importance
        mask = compared_mask(torch.where(important, first, scores), pattern, options.compare)
        return target * mask, mask

    def fit(error: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
        if basis is None:
            return randomized_range_finder(error, gram.matrix, rank, seed)
        return subspace_iteration_step(error, gram.matrix, basis)

    S, mask, basis, stats = alternate(Wt, gram, rank, options.iterations, prune, fit)
    result = unscale(S, mask, basis, Wt - S, gram)
    result.stats = stats
    return result
