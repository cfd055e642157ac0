"""Activation-weighted low rank alone: L = argmin tr((W - L) H (W - L)^T) over rank(L) <= r, and S = 0.

A baseline without a sparse part. SVD-LLM (arXiv 2403.07378) reaches the same optimum through a Cholesky factor of H.
"""

from dataclasses import dataclass

import torch

from ..format.decomposition import Decomposition
from ..format.hierarchy import HierarchyShape
from ..format.patterns import Pattern
from .base import exact_basis, scaled, unscale
from .gram import ScaledGram, squared_error
from .hierarchical_fit import HierarchicalFit, settle
from .permutation import orders_of

MOST_SWEEPS = 50


@dataclass(frozen=True)
class Options:
    """`method="svd"` has no options."""


def solve(
    weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Options, seed: int = 0
) -> Decomposition:
    """Decomposes one layer; see `registry.Solve`. S is empty; pattern and seed are not used.

    Raises:
        ValueError: the rank is 0.
    """
    if not rank:
        raise ValueError(f'rank={rank!r}: method="svd" has no sparse part, expected an integer >= 1')
    Wt = scaled(weight, gram)
    basis = exact_basis(Wt, gram, rank)
    result = unscale(torch.zeros_like(Wt), torch.zeros_like(Wt, dtype=torch.bool), basis, Wt, gram)
    objective = squared_error(Wt - basis @ (basis.T @ Wt), gram.matrix)
    result.stats = {"iterations": 1, "converged": True, "objective": objective}
    return result


def solve_hierarchical(
    weight: torch.Tensor,
    gram: ScaledGram,
    pattern: Pattern,
    shape: HierarchyShape,
    permutation: str | None,
    options: Options,
    seed: int = 0,
) -> Decomposition:
    """Decomposes one layer; see `registry.Method.solve_hierarchical`. S is empty; the seed is of the first bases."""
    Wt = scaled(weight, gram)
    fit = HierarchicalFit(shape, gram.matrix, orders_of(Wt, permutation), seed)
    sweeps, settled, objective = settle(fit, Wt, lambda E: squared_error(E, gram.matrix), MOST_SWEEPS)
    S = torch.zeros_like(Wt)
    result = Decomposition(S, S.bool(), hierarchy=fit.hierarchy(gram))
    result.stats = {"iterations": sweeps, "converged": settled, "objective": objective}
    return result
