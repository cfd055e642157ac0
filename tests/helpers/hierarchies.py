"""Random hierarchical matrices, and a reference that reads them entry by entry."""

import torch

from hf_sparselr.format.hierarchy import Hierarchy, HierarchyShape

from .layer_problems import randn

SHAPES = [
    HierarchyShape(64, 64, (8, 4)),
    HierarchyShape(16, 48, (2,)),
    HierarchyShape(37, 53, (3, 2, 1)),  # leaves that the matrix cuts off
    HierarchyShape(9, 33, (1, 1, 1)),  # leaves beyond the matrix
]


def random_hierarchy(
    shape: HierarchyShape, permuted: bool, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Hierarchy:
    factors = (randn(*shape.sizes[part], seed=seed + i).to(dtype) for i, part in enumerate(("A", "B", "leaves")))
    generator = torch.Generator().manual_seed(seed)
    orders = (
        torch.randperm(size, generator=generator).int() if permuted else None
        for size in (shape.out_features, shape.in_features)
    )
    return Hierarchy(shape, *factors, *orders)


def by_entries(hierarchy: Hierarchy) -> torch.Tensor:
    """The dense matrix from the format's definition, one entry after another."""
    shape = hierarchy.shape
    rows, columns = shape.leaf
    dense = torch.zeros(shape.out_features, shape.in_features, dtype=hierarchy.A.dtype)
    for i in range(shape.out_features):
        for j in range(shape.in_features):
            out = i if hierarchy.row_order is None else int(hierarchy.row_order[i])
            column = j if hierarchy.column_order is None else int(hierarchy.column_order[j])
            dense[out, column] = _entry(hierarchy, i, j, i // rows, j // columns)
    return dense


def _entry(hierarchy: Hierarchy, i: int, j: int, row_leaf: int, column_leaf: int) -> torch.Tensor:
    if row_leaf == column_leaf:
        return hierarchy.leaves[i, j - column_leaf * hierarchy.shape.leaf[1]]
    depth = hierarchy.shape.depth
    level = next(
        level for level in range(1, depth + 1) if row_leaf >> (depth - level) == (column_leaf >> (depth - level)) ^ 1
    )
    first = sum(hierarchy.shape.ranks[: level - 1])
    span = range(first, first + hierarchy.shape.ranks[level - 1])
    return sum(hierarchy.B[i, r] * hierarchy.A[r, j] for r in span)
