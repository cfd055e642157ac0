"""Magnitude pruning: keeps the largest |W| of a layer, or of each N:M group, unchanged. It uses no calibration data."""

from dataclasses import dataclass

import torch

from ..format.patterns import Pattern
from .base import one_shot, solve_by_pruning
from .gram import ScaledGram


@dataclass(frozen=True)
class Options:
    """`method="magnitude"` has no options."""


def prune(
    Wt: torch.Tensor, gram: ScaledGram, pattern: Pattern, options: Options
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """See `pruners.Pruner.prune`. Scores are the magnitudes of the unscaled weights, Wt / gram.scale."""
    mask = pattern.mask((Wt / gram.scale).abs())
    return one_shot(Wt * mask, mask, Wt, gram)


solve = solve_by_pruning("magnitude", prune)
