"""sHSS (arXiv 2601.07839): S keeps the largest magnitudes, and a recursive factorisation fits the rest.

S keeps the largest |W| of the layer or of each N:M group. The rest becomes a hierarchical matrix: dense leaves,
truncated SVDs beside them. With permutation="rcm" (sHSS-RCM) the largest entries of the rest first move near the
diagonal. The method does not see the layer's inputs: `method="3basil", low_rank="hss"` is the form that does. The
paper's code is not available: depth, ranks and graph are choices of this package.
"""

from dataclasses import dataclass

import torch

from ..format.decomposition import Decomposition
from ..format.hierarchy import HierarchyShape
from ..format.patterns import Pattern, project
from .base import balanced_factors, left_singular_vectors
from .gram import ScaledGram, squared_error
from .hierarchical_fit import truncate
from .permutation import orders_of


@dataclass(frozen=True)
class Options:
    """`method="shss"` has no options of its own; those of the hierarchy are in `hierarchy`."""


def solve_hierarchical(
    weight: torch.Tensor,
    gram: ScaledGram,
    pattern: Pattern,
    shape: HierarchyShape,
    permutation: str | None,
    options: Options,
    seed: int = 0,
) -> Decomposition:
    """Decomposes one layer; see `registry.Method.solve_hierarchical`. Nothing is random: the seed is not used."""
    W = weight.float().masked_fill(gram.dead, 0.0)
    S, mask = project(W, pattern)
    orders = orders_of(W - S, permutation)
    hierarchy = truncate(W - S, shape, orders)
    hierarchy.A.masked_fill_(gram.dead if orders is None else gram.dead[orders[1]], 0.0)  # free of rounding
    result = Decomposition(S, mask, hierarchy=hierarchy)
    result.stats = _stats(W - result.dense(), gram)
    return result


def solve(
    weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int = 0
) -> Decomposition:
    """The same at depth 0: a truncated SVD of W - S."""
    W = weight.float().masked_fill(gram.dead, 0.0)
    S, mask = project(W, pattern)
    basis = left_singular_vectors(W - S, rank)
    result = Decomposition(S, mask, *balanced_factors(basis, basis.T @ (W - S)))
    result.stats = _stats(W - result.dense(), gram)
    return result


def _stats(error: torch.Tensor, gram: ScaledGram) -> dict:
    objective = squared_error(error * gram.scale, gram.matrix)
    return {"iterations": 1, "converged": True, "objective": objective}
