"""Reverse Cuthill-McKee orders of rows and columns, which bring a matrix's largest entries near the diagonal."""

import torch

from .hierarchical_fit import Orders

EDGES = 1.0  # a node of the longer side


def orders_of(matrix: torch.Tensor, permutation: str | None) -> Orders | None:
    """Orders of the rows and columns of a matrix (out, in), int64 on its device; None without a permutation."""
    return None if permutation is None else reverse_cuthill_mckee(matrix)


def reverse_cuthill_mckee(matrix: torch.Tensor, edges: float = EDGES) -> Orders:
    """RCM on the bipartite graph of rows and columns whose edges are the largest entries.

    The bipartite graph also serves rectangular matrices, whose rows and columns have orders of their own. Rows and
    columns come out in the order in which the common one meets them.

    Args:
        matrix: (out, in).
        edges: for each row or column, whichever are more.
    """
    import numpy
    from scipy.sparse import bmat, csr_matrix
    from scipy.sparse.csgraph import reverse_cuthill_mckee as rcm

    rows, columns = matrix.shape
    flat = matrix.detach().abs().flatten()
    kept = min(max(1, round(edges * max(rows, columns))), flat.numel())
    largest = torch.topk(flat, kept, sorted=False).indices.cpu().numpy()
    pairs = largest // columns, largest % columns
    across = csr_matrix((numpy.ones(kept, dtype=numpy.int8), pairs), shape=(rows, columns))
    order = torch.from_numpy(rcm(bmat([[None, across], [across.T, None]], "csr"), True).astype("int64"))
    row_order, column_order = order[order < rows], order[order >= rows] - rows
    return row_order.to(matrix.device), column_order.to(matrix.device)
