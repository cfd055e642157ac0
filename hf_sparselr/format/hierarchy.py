"""The hierarchical form of a low-rank part: its shape, its tensors, the dense matrix they stand for.

Rows and columns are halved `depth` times. At level l, 1 <= l <= depth, the matrix has 2^l x 2^l blocks. Block
(k, k ^ 1), beside the diagonal, is a product of rank ranks[l - 1]. The 2^depth diagonal blocks of the last level, the
leaves, are dense. (arXiv 2601.07839 calls the form HSS. Bases are not nested: elsewhere it is known as HODLR.)

A level's blocks lie in disjoint rows and columns, so the factors of a level fill two matrices of the shapes of flat
factors, and those of all levels are stacked:

    A             float (sum of ranks, in)       column j of level l's rows: right factor of the block with column j
    B             float (out, sum of ranks)      row i of level l's columns: left factor of the block with row i
    leaves        float (out, leaf columns)      row i: its entries in its leaf
    ranks         int32 (depth,)
    row_order     int32 (out,)                   the output at every position; absent without a permutation
    column_order  int32 (in,)                    the input at every position; absent without a permutation

A leaf has ceil(out / 2^depth) rows and ceil(in / 2^depth) columns; the last ones are cut off by the matrix, and entries
of `leaves` beyond it are zero. A, B and leaves are in the order of positions, not of outputs and inputs.
"""

import itertools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

FLOAT_PARTS = ("A", "B", "leaves")
ORDER_PARTS = ("row_order", "column_order")
PARTS = (*FLOAT_PARTS, "ranks", *ORDER_PARTS)


@dataclass(frozen=True)
class HierarchyShape:
    """How a matrix (out, in) is split.

    Attributes:
        out_features, in_features: of the matrix.
        ranks: of the blocks beside the diagonal, level by level from the outermost; at least one.
    """

    out_features: int
    in_features: int
    ranks: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """The sum of the ranks: rows of A, columns of B."""
        return sum(self.ranks)

    @property
    def leaf(self) -> tuple[int, int]:
        """Rows and columns of a leaf."""
        leaves = 2**self.depth
        return -(-self.out_features // leaves), -(-self.in_features // leaves)

    def block(self, level: int) -> tuple[int, int]:
        """Rows and columns of a block at a level."""
        rows, columns = self.leaf
        return rows << (self.depth - level), columns << (self.depth - level)

    @property
    def padded(self) -> tuple[int, int]:
        """(out, in) up to whole leaves."""
        return self.block(0)

    @property
    def spans(self) -> list[slice]:
        """The rows of A, and columns of B, of every level."""
        ends = [sum(self.ranks[:level]) for level in range(self.depth + 1)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors."""
        return {
            "A": (self.rank, self.in_features),
            "B": (self.out_features, self.rank),
            "leaves": (self.out_features, self.leaf[1]),
            "ranks": (self.depth,),
            "row_order": (self.out_features,),
            "column_order": (self.in_features,),
        }

    @property
    def parameters(self) -> int:
        """Floats that are stored."""
        return self.rank * (self.out_features + self.in_features) + self.out_features * self.leaf[1]

    def problem(self) -> str | None:
        """Why a matrix cannot be split so, or None."""
        if min(self.out_features, self.in_features) < 2**self.depth:
            return f"depth {self.depth} splits {self.out_features} x {self.in_features} into empty leaves"
        for level, rank in enumerate(self.ranks, start=1):
            if rank >= min(self.block(level)):
                rows, columns = self.block(level)
                return f"rank {rank} must be smaller than both sides of level {level}'s blocks {rows} x {columns}"
        return None


@dataclass
class Hierarchy:
    """The tensors of a hierarchical matrix; see above.

    Attributes:
        shape: how it is split.
        A, B, leaves: one float dtype.
        row_order, column_order: int32, both or none.
    """

    shape: HierarchyShape
    A: torch.Tensor
    B: torch.Tensor
    leaves: torch.Tensor
    row_order: torch.Tensor | None = None
    column_order: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """The matrix (out, in); differentiable in A, B and the leaves."""
        matrix = assemble(self.shape, self.A, self.B, self.leaves)
        if self.row_order is None or self.column_order is None:
            return matrix
        return matrix[inverse_order(self.row_order)][:, inverse_order(self.column_order)]

    def scale_(self, factor: float) -> None:
        """Multiplies the matrix, in place, by a positive factor."""
        for tensor, share in ((self.A, factor**0.5), (self.B, factor**0.5), (self.leaves, factor)):
            tensor.mul_(share)


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """int64 (n,): the position of every index in an order."""
    return torch.argsort(order)


def assemble(shape: HierarchyShape, A: torch.Tensor, B: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """The dense matrix (out, in) in the order of positions: from the leaves outwards, two blocks become one."""
    diagonal = leaf_blocks(shape, leaves)
    A, B = pad_factors(shape, A, B)
    for level in range(shape.depth, 0, -1):
        span = shape.spans[level - 1]
        left = B[:, span].unflatten(0, (2**level, -1))
        right = swap_siblings(A[span].unflatten(1, (2**level, -1)).transpose(0, 1))
        beside = left @ right
        top = torch.cat([diagonal[0::2], beside[0::2]], dim=2)
        bottom = torch.cat([beside[1::2], diagonal[1::2]], dim=2)
        diagonal = torch.cat([top, bottom], dim=1)
    return diagonal[0, : shape.out_features, : shape.in_features]


def leaf_blocks(shape: HierarchyShape, leaves: torch.Tensor) -> torch.Tensor:
    """leaves (out, leaf columns) as (2^depth, leaf rows, leaf columns), rows beyond the matrix zero."""
    padded = pad_to(leaves, shape.padded[0], leaves.shape[1])
    return padded.unflatten(0, (2**shape.depth, -1))


def pad_factors(shape: HierarchyShape, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B up to whole leaves: as they are where the leaves fill the matrix."""
    return pad_to(A, A.shape[0], shape.padded[1]), pad_to(B, shape.padded[0], B.shape[1])


def pad_to(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Zeros up to so many rows and columns; the matrix itself where there is nothing to add."""
    missing = rows - matrix.shape[-2], columns - matrix.shape[-1]
    return F.pad(matrix, (0, missing[1], 0, missing[0])) if any(missing) else matrix


def swap_siblings(blocks: torch.Tensor) -> torch.Tensor:
    """(2^l, ...): every block in the place of its sibling."""
    return blocks.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
