"""Wanda (arXiv 2306.11695): keeps the entries with the largest |W_ij| ||X_j||, unchanged.

In scaled coordinates that score is |Wt|. The paper (section 3) compares scores within each output row and finds this
better than over the whole layer. Both keep the same number of entries in total.
"""

from dataclasses import dataclass

import torch

from ..format.patterns import COMPARE, Pattern, compared_mask
from ..utils.validation import check_choice
from .base import one_shot, solve_by_pruning
from .gram import ScaledGram


@dataclass(frozen=True)
class Options:
    """Options of `method="wanda"`.

    Attributes:
        compare: where scores compete under an unstructured pattern: "row" (each output row, the paper's choice) or
            "layer". Under N:M they compete within groups in any case.
    """

    compare: str = "row"

    def __post_init__(self) -> None:
        check_choice("method_options.compare", self.compare, COMPARE)


def prune(
    Wt: torch.Tensor, gram: ScaledGram, pattern: Pattern, options: Options
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """See `pruners.Pruner.prune`."""
    mask = compared_mask(Wt.abs(), pattern, options.compare)
    return one_shot(Wt * mask, mask, Wt, gram)


solve = solve_by_pruning("wanda", prune)
