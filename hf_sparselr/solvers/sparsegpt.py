"""SparseGPT (arXiv 2301.00774): optimal brain surgeon, one column after the other.

Columns are fixed in their natural order. Removing w_j costs w_j^2 / [F^-1]_jj, where F is the Gram matrix of the
columns from j on. The update w_k -= w_j [F^-1]_jk / [F^-1]_jj of the columns k > j compensates for it. Up to a factor
U_jj, every such row of F^-1 is a row of one upper triangular U with U^T U = G^-1 (section 3.2, Algorithm 1).

Within a block a column is updated for all earlier removals when its turn comes, by one product of a matrix and a
vector: two small kernels per column. Nothing between columns waits for the host, so a CUDA graph can hold all of it.

The paper damps by 1% of the mean diagonal; here the damping of the Gram matrix takes that place. If it is (0, 0) and G
is singular, jitter is added (`stats["jitter"]`, see `ScaledGram.inverse_factor`).
"""

from dataclasses import dataclass
from functools import partial

import torch

from ..format.patterns import NM, Pattern, top_mask
from ..utils.cuda_graphs import GraphedCallable
from ..utils.validation import check_integer
from .base import Repeated, one_shot, solve_by_pruning
from .gram import ScaledGram


@dataclass(frozen=True)
class Options:
    """Options of `method="sparsegpt"`.

    Attributes:
        block: columns for which an unstructured support is chosen at once, and between two updates of all later
            columns. Under N:M every group is chosen when its first column is reached: there `block` is rounded down to
            whole groups and changes only the speed.
    """

    block: int = 128

    def __post_init__(self) -> None:
        check_integer("method_options.block", self.block, 1)


def prune(
    Wt: torch.Tensor, gram: ScaledGram, pattern: Pattern, options: Options
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """See `pruners.Pruner.prune`. `stats` also holds the jitter."""
    S, mask = repeated(gram, pattern, options)(Wt)
    return one_shot(S, mask, Wt, gram, jitter=gram.inverse_factor[1])


def repeated(gram: ScaledGram, pattern: Pattern, options: Options) -> Repeated:
    """See `pruners.Pruner.repeated`."""
    U, _ = gram.inverse_factor
    pivots = U.diagonal()[:, None]
    # entry (k, j): the change of column k that compensates for a unit removed from column j
    shares = (U / pivots).T.contiguous()
    return GraphedCallable(lambda Wt: _prune(Wt, shares, pivots, pattern, options.block), U.device)


def _prune(
    Wt: torch.Tensor, shares: torch.Tensor, pivots: torch.Tensor, pattern: Pattern, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1: (S, mask), both (out, in)."""
    W = Wt.T.clone(memory_format=torch.contiguous_format)  # a column of Wt is a contiguous row
    mask, span = torch.empty_like(W, dtype=torch.bool), block
    if isinstance(pattern, NM):
        span, block = pattern.m, max(block - block % pattern.m, pattern.m)
    for columns in _split(len(W), block):
        choose = _chooser(pattern, Wt.shape, columns)
        mask[columns], removed = _fix(W[columns], shares[columns, columns], pivots[columns], span, choose)
        behind = slice(columns.stop, None)
        W[behind].addmm_(shares[behind, columns], removed, alpha=-1)
    return (W * mask).T.contiguous(), mask.T.contiguous()


def _split(size: int, width: int) -> list[slice]:
    return [slice(first, min(first + width, size)) for first in range(0, size, width)]


def _chooser(pattern: Pattern, shape: tuple[int, int], columns: slice):
    """A function from the scores (width, out) of some columns of a layer (out, in) to their mask."""
    if isinstance(pattern, NM):
        return partial(_largest, n=pattern.n)
    # Running totals in proportion to the columns: the blocks add up to exactly the layer's number.
    before, after = (pattern.kept(shape) * end // shape[1] for end in (columns.start, columns.stop))
    return partial(top_mask, kept=after - before)


def _largest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """`NM.mask` of one group in a few kernels: the n largest of (m, out) along the first dimension."""
    first = torch.ones(len(scores), len(scores), dtype=torch.bool, device=scores.device).triu(1)[..., None]
    wins = torch.where(first, scores[:, None] >= scores, scores[:, None] > scores)
    return wins.sum(0) < n


def _fix(W: torch.Tensor, shares: torch.Tensor, pivots: torch.Tensor, span: int, choose):
    """Fixes a block of columns (width, out) in place; returns their mask and the removed entries."""
    mask, removed = torch.empty_like(W, dtype=torch.bool), torch.empty_like(W)
    for group in _split(len(W), span):
        if group.start:
            before = slice(0, group.start)
            W[group].addmm_(shares[group, before], removed[before], alpha=-1)
        mask[group] = choose((W[group] / pivots[group]).square())
        torch.logical_not(mask[group], out=removed[group])
        for j in range(group.start, group.stop):
            if j > group.start:
                fixed = slice(group.start, j)
                W[j].addmv_(removed[fixed].T, shares[j, fixed], alpha=-1)
            removed[j].mul_(W[j])
    return mask, removed


solve = solve_by_pruning("sparsegpt", prune)
