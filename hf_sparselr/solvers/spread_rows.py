"""Supports of a layer whose rows are spread over processes: unstructured scores compete within the whole layer."""

import math

import torch

from ..format.patterns import NM, Pattern, Unstructured, sampled_threshold
from ..utils.world import World


def exact_mask(scores: torch.Tensor, pattern: Pattern, out: int, world: World) -> torch.Tensor:
    """The rows of `pattern.mask` that belong to the rows of scores (rows, in) of this process.

    Args:
        out: rows of the layer in all processes.
    """
    if world.size == 1 or isinstance(pattern, NM):
        return pattern.mask(scores)
    return pattern.mask(world.all_rows(scores, out))[world.rows(out)]


def near_threshold(
    scores: torch.Tensor, pattern: Unstructured, out: int, guess: float | None, world: World
) -> torch.Tensor:
    """`pattern.threshold` of the scores of all processes, (1,)."""
    shape = (out, scores.shape[1])
    zeros = math.prod(shape) - pattern.kept(shape)
    if world.size == 1 or not zeros:
        return pattern.threshold(scores, guess)
    if not scores.is_cuda:
        return pattern.threshold(world.all_rows(scores, out), guess)

    def gather(sample: torch.Tensor) -> torch.Tensor:
        most = len(sample) + shape[1]  # the others have at most a row more
        padded = torch.cat([sample, sample.new_full((most - len(sample),), torch.inf)])
        return world.all_rows(padded, most * world.size)

    return sampled_threshold(scores, zeros, math.prod(shape), gather, world.sum_)
