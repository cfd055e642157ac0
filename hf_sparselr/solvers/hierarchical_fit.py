"""Fits of a matrix by a hierarchical one (format/hierarchy.py): recursive, and weighted by a Gram matrix.

The weighted fit minimises tr((E - L) G (E - L)^T) by block coordinate descent. G couples the columns of a row but no
two rows, and a level's blocks lie in disjoint rows: given the other levels, all blocks of a level are fitted at once.
For a block with rows I and columns J and the residual D of the others, the best dense block is X = D_I G_J C with
C = (G_JJ)^-1, and the best one of rank r is P P^T X, P the leading left singular vectors of X (G_JJ)^(1/2). P moves by
one warm-started subspace step a sweep, as in `admm`; leaves take X itself. A sweep costs one product with G.
"""

from collections.abc import Callable

import torch

from ..format.hierarchy import Hierarchy, HierarchyShape, inverse_order, pad_to, swap_siblings
from .base import balanced_factors, cholesky_qr_batch
from .gram import ScaledGram

Orders = tuple[torch.Tensor, torch.Tensor]  # row_order, column_order, int64

START_STEPS = 5  # subspace steps from a random sketch


def truncate(matrix: torch.Tensor, shape: HierarchyShape, orders: Orders | None) -> Hierarchy:
    """The recursive factorisation in the Frobenius norm: truncated SVDs beside the diagonal, dense leaves.

    Args:
        matrix: (out, in) FP32.
        shape: of the hierarchy.
        orders: of rows and columns, None as they are.
    """
    positions = pad_to(_permuted(matrix, orders), *shape.padded)

    def factorise(blocks: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        U, values, V = torch.linalg.svd(blocks, full_matrices=False)
        root = values[:, :rank].sqrt()
        return U[:, :, :rank] * root[:, None, :], root[:, :, None] * V[:, :rank]

    pairs = [factorise(_blocks(positions, level, beside=True), rank) for level, rank in enumerate(shape.ranks, start=1)]
    return _stacked(shape, pairs, _blocks(positions, shape.depth, beside=False), orders)


class HierarchicalFit:
    """The weighted fit of errors that change from sweep to sweep.

    Args:
        shape: of the hierarchy.
        gram: G (in, in), on the device of the errors.
        orders: of rows and columns, None as they are.
        seed: of the first bases.
    """

    def __init__(self, shape: HierarchyShape, gram: torch.Tensor, orders: Orders | None = None, seed: int = 0) -> None:
        self.shape, self.orders = shape, orders
        if orders is not None:
            gram = gram[orders[1]][:, orders[1]]
        self._gram = pad_to(gram, shape.padded[1], shape.padded[1])
        self._levels = range(1, shape.depth + 1)
        self._beside = {level: swap_siblings(_blocks(self._gram, level, beside=False)) for level in self._levels}
        self._inverses = {level: swap_siblings(self._inverse(level)) for level in self._levels}
        self._leaf_inverse = swap_siblings(self._inverses[shape.depth])
        self._generator = torch.Generator().manual_seed(seed)
        # A sweep changes these in place, so that it can be replayed as a CUDA graph.
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._leaves = gram.new_zeros(2**shape.depth, *shape.leaf)
        self._total = gram.new_zeros(shape.padded)

    def reset(self) -> None:
        """L = 0. The bases stay."""
        for tensor in (self._leaves, self._total, *(right for _, right in self._pairs.values())):
            tensor.zero_()

    def _inverse(self, level: int) -> torch.Tensor:
        """(G_JJ)^-1 of every column block, (2^l, columns, columns); columns beyond the matrix are the identity's."""
        blocks = _blocks(self._gram, level, beside=False).clone()
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        diagonal[diagonal == 0] = 1.0
        factors, failed = torch.linalg.cholesky_ex(blocks)
        if not failed.any():
            return torch.cholesky_inverse(factors)
        values, vectors = torch.linalg.eigh(blocks)  # G is singular
        rounding = torch.finfo(blocks.dtype).eps * blocks.shape[-1] * values[:, -1:]
        weights = torch.where(values > rounding, 1 / values, 0.0)
        return (vectors * weights[:, None, :]) @ vectors.mT

    def sweep(self, error: torch.Tensor) -> torch.Tensor:
        """One round over levels and leaves for E (out, in): the objective never rises. Returns L (out, in)."""
        residual = pad_to(_permuted(error, self.orders), *self.shape.padded) - self._total
        for level in self._levels:
            self._fit_level(level, residual)
        self._fit_leaves(residual)
        return self.matrix()

    def matrix(self) -> torch.Tensor:
        """L (out, in)."""
        positions = self._total[: self.shape.out_features, : self.shape.in_features]
        if self.orders is None:
            return positions
        rows, columns = (inverse_order(order) for order in self.orders)
        return positions[rows][:, columns]

    def _seen(self, residual: torch.Tensor, level: int, beside: bool) -> torch.Tensor:
        """D_I G_J of the blocks of a level, (2^l, rows, columns), without their own part."""
        rows = residual.unflatten(0, (2**level, -1))
        columns = self._gram.unflatten(1, (2**level, -1)).transpose(0, 1)
        if not beside:
            return rows @ columns
        pairs = rows[0::2] @ columns[1::2], rows[1::2] @ columns[0::2]
        return torch.stack(pairs, dim=1).flatten(0, 1)

    def _fit_level(self, level: int, residual: torch.Tensor) -> None:
        seen, inverse = self._seen(residual, level, beside=True), self._inverses[level]
        if level not in self._pairs:
            self._pairs[level] = self._begin(level, seen)
        own, right = self._pairs[level]
        seen = seen + own @ (right @ self._beside[level])
        left = _subspace_step(seen, inverse, own)
        best = (left.mT @ seen) @ inverse
        self._move(left @ best - own @ right, level, True, residual)
        own.copy_(left)
        right.copy_(best)

    def _begin(self, level: int, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The left and right factors of a level before its first fit: from a random sketch, the same on every device,
        and zero."""
        rank = self.shape.ranks[level - 1]
        sketch = torch.randn(*seen.shape[::2], rank, generator=self._generator)
        left = torch.linalg.qr(seen @ sketch.to(seen)).Q
        for _ in range(START_STEPS - 1):
            left = _subspace_step(seen, self._inverses[level], left)
        return left, seen.new_zeros(len(seen), rank, seen.shape[2])

    def _fit_leaves(self, residual: torch.Tensor) -> None:
        level = self.shape.depth
        change = self._seen(residual, level, beside=False) @ self._leaf_inverse
        self._move(change, level, False, residual)
        self._leaves += change

    def _move(self, change: torch.Tensor, level: int, beside: bool, residual: torch.Tensor) -> None:
        for matrix, sign in ((self._total, 1), (residual, -1)):
            view, rows, columns = _block_index(matrix, level, beside)
            view[rows, :, columns] += sign * change

    def hierarchy(self, gram: ScaledGram) -> Hierarchy:
        """L in the layer's own coordinates, which `gram` has scaled, with balanced factors."""
        alive = ~gram.dead / gram.scale
        if self.orders is not None:
            alive = alive[self.orders[1]]
        alive = pad_to(alive[None], 1, self.shape.padded[1])[0]
        pairs = []
        for level in self._levels:
            left, right = self._pairs[level]
            scales = swap_siblings(alive.unflatten(0, (2**level, -1)))
            both = [balanced_factors(*pair) for pair in zip(left, right * scales[:, None], strict=True)]
            pairs.append((torch.stack([B for _, B in both]), torch.stack([A for A, _ in both])))
        leaves = self._leaves * alive.unflatten(0, (2**self.shape.depth, -1))[:, None]
        return _stacked(self.shape, pairs, leaves, self.orders)


def _subspace_step(seen: torch.Tensor, inverse: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Bases (2^l, rows, r) nearer to the leading singular vectors of X (G_JJ)^(1/2), for X = `seen` (G_JJ)^-1."""
    return cholesky_qr_batch(seen @ (inverse @ (seen.mT @ left)))


def settle(
    fit: HierarchicalFit, error: torch.Tensor, objective: Callable[[torch.Tensor], float], most: int
) -> tuple[int, bool, float]:
    """Sweeps over one error until a sweep lowers the objective by less than a thousandth of it.

    Args:
        objective: a function of the residual E - L.
        most: sweeps.

    Returns:
        (sweeps, whether it settled, the objective).
    """
    last = objective(error - fit.sweep(error))
    for sweep in range(2, most + 1):
        value = objective(error - fit.sweep(error))
        if last - value < 1e-3 * value:
            return sweep, True, value
        last = value
    return most, False, last


def _permuted(matrix: torch.Tensor, orders: Orders | None) -> torch.Tensor:
    return matrix if orders is None else matrix[orders[0]][:, orders[1]]


def _block_index(matrix: torch.Tensor, level: int, beside: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A view (2^l, rows, 2^l, columns), and the indices of a level's blocks in its first and third dimension."""
    index = torch.arange(2**level, device=matrix.device)
    view = matrix.unflatten(1, (2**level, -1)).unflatten(0, (2**level, -1))
    return view, index, index ^ 1 if beside else index


def _blocks(matrix: torch.Tensor, level: int, beside: bool) -> torch.Tensor:
    """The blocks beside the diagonal, or on it, by block row: (2^l, rows, columns), a copy."""
    view, rows, columns = _block_index(matrix, level, beside)
    return view[rows, :, columns]


def leaf_mask(shape: HierarchyShape, orders: Orders | None, device: torch.device) -> torch.Tensor:
    """bool (out, in): the entries that lie in leaves."""
    rows, columns = (
        torch.arange(size, device=device) // side
        for size, side in zip((shape.out_features, shape.in_features), shape.leaf, strict=True)
    )
    if orders is not None:
        rows, columns = rows[inverse_order(orders[0])], columns[inverse_order(orders[1])]
    return rows[:, None] == columns[None, :]


def _stacked(
    shape: HierarchyShape,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    leaves: torch.Tensor,
    orders: Orders | None,
) -> Hierarchy:
    """The stored form from the blocks' factors: (left (2^l, rows, r), right (2^l, r, columns)) by block row."""
    B = torch.cat([left.flatten(0, 1) for left, _ in pairs], dim=1)
    A = torch.cat([swap_siblings(right).transpose(0, 1).flatten(1) for _, right in pairs])
    A, B = A[:, : shape.in_features].contiguous(), B[: shape.out_features].contiguous()
    leaves = leaves.flatten(0, 1)[: shape.out_features].contiguous()
    stored = (None, None) if orders is None else tuple(order.int() for order in orders)
    return Hierarchy(shape, A, B, leaves, *stored)
