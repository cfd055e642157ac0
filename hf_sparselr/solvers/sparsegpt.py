"""SparseGPT (arXiv 2301.00774): optimal brain surgeon, one column after the other.

Columns are fixed in their natural order. Removing w_j costs w_j^2 / [F^-1]_jj, where F is the Gram matrix of the
columns from j on, and is made up for by w_k -= w_j [F^-1]_jk / [F^-1]_jj in the columns k > j. Every such row of
F^-1 is a row of one upper triangular U with U^T U = G^-1, up to a factor U_jj (section 3.2, Algorithm 1).

U here is the inverse of the upper triangular R with R R^T = G, a Cholesky factorisation from the last column to
the first: the same U without the inverse of G, whose rounding errors would enter twice.

The paper damps by 1% of the mean diagonal; the damping of the Gram matrix takes that place. Where it is (0, 0)
and G is singular, the smallest power of ten is added to the diagonal that leaves every pivot above rounding
(`stats["jitter"]`, for a unit diagonal).
"""

import itertools
from dataclasses import dataclass

import torch

from ..checks import check_integer
from ..gram import ScaledGram
from ..patterns import NM, Pattern, top_mask
from .base import one_shot


@dataclass(frozen=True)
class Options:
    """Options of `method="sparsegpt"`.

    Attributes:
        block: columns for which an unstructured support is chosen at once, and between two updates of the columns
            behind them. Under N:M, where every group is chosen when its first column is reached, it is rounded
            down to whole groups and changes nothing but the speed.
    """

    block: int = 128

    def __post_init__(self) -> None:
        check_integer("solver.block", self.block, 1)


def prune(
    Wt: torch.Tensor, gram: ScaledGram, pattern: Pattern, options: Options
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """See `pruners.Pruner.prune`. `stats` also holds the jitter."""
    U, jitter = inverse_factor(gram.matrix)
    S, mask = Wt.clone(), torch.empty_like(Wt, dtype=torch.bool)
    inputs, block, span = Wt.shape[1], options.block, options.block
    if isinstance(pattern, NM):
        block, span = max(block - block % pattern.m, pattern.m), pattern.m
    for first in range(0, inputs, block):
        columns = slice(first, min(first + block, inputs))
        choose = _chooser(pattern, Wt.shape, first)
        fixed, chosen, removed = _fix(S[:, columns], U[columns, columns], span, choose)
        S[:, columns], mask[:, columns] = fixed, chosen
        S[:, columns.stop :] -= removed @ U[columns, columns.stop :]
    return one_shot(S, mask, Wt, gram, jitter=jitter)


def _chooser(pattern: Pattern, shape: tuple[int, int], first: int):
    """Scores (out, width) of the columns from `first` on -> their mask."""
    if isinstance(pattern, NM):
        return pattern.mask

    def choose(scores: torch.Tensor) -> torch.Tensor:
        # running totals in proportion to the columns: the blocks add up to the layer's exact number
        before, after = (pattern.kept(shape) * n // shape[1] for n in (first, first + scores.shape[1]))
        return top_mask(scores, after - before)

    return choose


def _fix(W: torch.Tensor, U: torch.Tensor, span: int, choose):
    """Prunes one block of columns (out, width): the fixed columns, their mask, and removed weights / U_jj."""
    W = W.T.contiguous()  # columns are worked on one at a time
    fixed, removed = torch.empty_like(W), torch.empty_like(W)
    mask = torch.empty_like(W, dtype=torch.bool)
    pivots = U.diagonal()[:, None]
    for j in range(len(W)):
        if j % span == 0:
            group = slice(j, j + span)
            mask[group] = choose((W[group] / pivots[group]).square().T).T
        fixed[j] = W[j] * mask[j]
        removed[j] = (W[j] - fixed[j]) / pivots[j]
        W[j + 1 :].addr_(U[j, j + 1 :], removed[j], alpha=-1)
    return fixed.T, mask.T, removed.T


def inverse_factor(G: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Upper triangular U with U^T U = (G + jitter I)^-1, and the jitter.

    Args:
        G: (n, n), symmetric, positive semidefinite up to rounding, unit diagonal.
    """
    identity = torch.eye(len(G), dtype=G.dtype, device=G.device)
    for jitter in itertools.chain([0.0], (10.0**power for power in itertools.count(-7))):
        R, failed = torch.linalg.cholesky_ex((G + jitter * identity).flip(0, 1))
        if not failed and float(R.diagonal().square().min()) > torch.finfo(G.dtype).eps:
            return torch.linalg.solve_triangular(R.flip(0, 1), identity, upper=True), jitter
