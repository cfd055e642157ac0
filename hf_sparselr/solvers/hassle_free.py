"""HASSLE-free (arXiv 2502.00899): alternate a pruner on W - L and the Gram-weighted low-rank fit of W - S.

Both steps minimise the objective of the layer, tr((W - S - L) H (W - S - L)^T). The first iterate is EoRA with the same
pruner and the best iterate is returned, so the result is never worse than EoRA's.

The paper fits the factors of L by gradient steps. Here the fit is the exact one in closed form (`exact_basis`), as in
the authors' later comparison (arXiv 2603.01376). The pruner starts afresh in every iteration.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..format.decomposition import Decomposition
from ..format.patterns import Pattern
from ..utils.validation import build_options, check_integer
from .alternating import alternate
from .base import exact_basis, scaled, unscale
from .gram import ScaledGram
from .pruners import PRUNERS


@dataclass(frozen=True)
class Options:
    """Options of `method="hassle-free-sparsegpt"` and `method="hassle-free-alps"`.

    Attributes:
        iterations: of the alternation; the default is the authors' number.
        pruner_options: options of the pruner, a dict or its dataclass.
    """

    pruner: ClassVar[str]
    iterations: int = 80
    pruner_options: Any = None

    def __post_init__(self) -> None:
        check_integer("method_options.iterations", self.iterations, 1)
        options = build_options("method_options.pruner_options", self.pruner_options, PRUNERS[self.pruner].options)
        object.__setattr__(self, "pruner_options", options)


class SparseGPTOptions(Options):
    pruner = "sparsegpt"


class ALPSOptions(Options):
    pruner = "alps"


def solve(
    weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int = 0
) -> Decomposition:
    """Decomposes one layer; see `registry.Solve`. Nothing is random: the seed is not used.

    Returns:
        The best iterate, with the `stats` of `alternate`.
    """
    Wt = scaled(weight, gram)
    S, mask, basis, stats = alternate(
        Wt,
        gram,
        rank,
        options.iterations,
        prune=PRUNERS[options.pruner].repeated(gram, pattern, options.pruner_options),
        fit=lambda error, _: exact_basis(error, gram, rank),
    )
    result = unscale(S, mask, basis, Wt - S, gram)
    result.stats = stats
    return result
