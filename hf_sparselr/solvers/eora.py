"""EoRA (arXiv 2410.21271): prune once, then fit the error by a low-rank part in the eigenspace of the inputs.

The paper projects the compression error E = Wt - S on Q sqrt(Lambda), from the eigendecomposition G = Q Lambda Q^T,
truncates its SVD and projects back through the inverse. This minimises tr((E - L) G (E - L)^T) over rank(L) <= r.
`exact_basis` finds the same L without an inverse, so that G may be singular.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..format.decomposition import Decomposition
from ..format.patterns import Pattern
from ..utils.validation import build_options, check_choice
from .base import exact_basis, scaled, unscale
from .gram import ScaledGram, squared_error
from .pruners import PRUNERS


@dataclass(frozen=True)
class Options:
    """Options of `method="eora"`.

    Attributes:
        pruner: "sparsegpt", "alps", "wanda" or "magnitude".
        pruner_options: options of the pruner, a dict or its dataclass.
    """

    pruner: str = "sparsegpt"
    pruner_options: Any = None

    def __post_init__(self) -> None:
        check_choice("method_options.pruner", self.pruner, tuple(PRUNERS))
        options = build_options("method_options.pruner_options", self.pruner_options, PRUNERS[self.pruner].options)
        object.__setattr__(self, "pruner_options", options)


def solve(
    weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int = 0
) -> Decomposition:
    """Decomposes one layer; see `registry.Solve`. Nothing is random: the seed is not used.

    Returns:
        The decomposition, with the `stats` of the pruner and the objective after the fit.
    """
    Wt = scaled(weight, gram)
    S, mask, stats = PRUNERS[options.pruner].prune(Wt, gram, pattern, options.pruner_options)
    E = Wt - S
    basis = exact_basis(E, gram, rank) if rank else None
    result = unscale(S, mask, basis, E, gram)
    left = E if basis is None else E - basis @ (basis.T @ E)
    result.stats = {**stats, "objective": squared_error(left, gram.matrix)}
    return result
