"""Few rows of x against a hierarchical matrix in two launches (Triton); see kernels/hierarchy.py.

The first multiplies every leaf's columns of A by the leaf's inputs. The second sums the siblings' results, multiplies
them by B and adds the leaf's own product. A, B and the leaves are read once for every row of x.
"""

import torch
import triton
import triton.language as tl

from ...format.hierarchy import Hierarchy

RANKS, ROWS, COLUMNS = 8, 8, 128  # of the tiles


@triton.jit
def _see(
    x,
    A,
    order,
    seen,
    ins,
    width,
    rank,
    leaves,
    PERMUTED: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    leaf, sample = tl.program_id(0), tl.program_id(2)
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for k in range(0, width, COLUMNS):
        inside = k + tl.arange(0, COLUMNS)
        column = leaf * width + inside
        real = (inside < width) & (column < ins)
        source = column
        if PERMUTED:
            source = tl.load(order + column, mask=real, other=0)
        inputs = tl.load(x + sample * ins + source, mask=real, other=0).to(tl.float32)
        entries = tl.load(A + r[:, None] * ins + column[None, :], mask=(r[:, None] < rank) & real[None, :], other=0)
        total += entries.to(tl.float32) * inputs[None, :]
    tl.store(seen + (sample * leaves + leaf) * rank + r, tl.sum(total, 1), mask=r < rank)


@triton.jit
def _answer(
    x,
    B,
    dense,
    seen,
    row_order,
    column_order,
    base,
    y,
    ins,
    outs,
    height,
    width,
    rank,
    leaves,
    PERMUTED: tl.constexpr,
    BASE: tl.constexpr,
    ENDS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    leaf, sample = tl.program_id(0), tl.program_id(2)
    inside = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = leaf * height + inside
    real_row = (inside < height) & (row < outs)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for q in range(0, rank, COLUMNS):
        r = q + tl.arange(0, COLUMNS)
        shift = tl.zeros((COLUMNS,), tl.int32)  # depth minus the level of every rank
        for level in tl.static_range(len(ENDS) - 1):
            shift += (r < ENDS[level]).to(tl.int32)
        first = ((leaf >> shift) ^ 1) << shift  # of the sibling's leaves
        answer = tl.zeros((COLUMNS,), tl.float32)
        for j in range(HALF):
            wanted = (r < rank) & (j < (1 << shift))
            answer += tl.load(seen + (sample * leaves + first + j) * rank + r, mask=wanted, other=0)
        entries = tl.load(B + row[:, None] * rank + r[None, :], mask=real_row[:, None] & (r[None, :] < rank), other=0)
        total += entries.to(tl.float32) * answer[None, :]
    for k in range(0, width, COLUMNS):
        place = k + tl.arange(0, COLUMNS)
        column = leaf * width + place
        real = (place < width) & (column < ins)
        source = column
        if PERMUTED:
            source = tl.load(column_order + column, mask=real, other=0)
        inputs = tl.load(x + sample * ins + source, mask=real, other=0).to(tl.float32)
        entries = tl.load(
            dense + row[:, None] * width + place[None, :], mask=real_row[:, None] & real[None, :], other=0
        )
        total += entries.to(tl.float32) * inputs[None, :]
    result = tl.sum(total, 1)
    out = row
    if PERMUTED:
        out = tl.load(row_order + row, mask=real_row, other=0)
    if BASE:
        result += tl.load(base + sample * outs + out, mask=real_row, other=0).to(tl.float32)
    tl.store(y + sample * outs + out, result, mask=real_row)


def multiply_few(rows: torch.Tensor, hierarchy: Hierarchy, base: torch.Tensor | None = None) -> torch.Tensor:
    """x L^T, plus `base`: (rows, in) to (rows, out).

    Args:
        rows: x, of the dtype and device of the hierarchy.
        base: (rows, out) or None.
    """
    shape, samples = hierarchy.shape, len(rows)
    (height, width), ranks = shape.leaf, shape.rank
    leaves, permuted = 2**shape.depth, hierarchy.row_order is not None
    sizes = {"ins": shape.in_features, "width": width, "rank": ranks, "leaves": leaves}
    rows = rows.contiguous()
    seen = torch.empty(samples, leaves, ranks, dtype=torch.float32, device=rows.device)
    y = rows.new_empty(samples, shape.out_features)
    row_order, column_order = (hierarchy.row_order, hierarchy.column_order) if permuted else (rows, rows)
    _see[leaves, triton.cdiv(ranks, RANKS), samples](
        rows,
        hierarchy.A,
        column_order,
        seen,
        **sizes,
        PERMUTED=permuted,
        RANKS=RANKS,
        COLUMNS=COLUMNS,
    )
    _answer[leaves, triton.cdiv(height, ROWS), samples](
        rows,
        hierarchy.B,
        hierarchy.leaves,
        seen,
        row_order,
        column_order,
        y if base is None else base.contiguous(),
        y,
        **sizes,
        outs=shape.out_features,
        height=height,
        PERMUTED=permuted,
        BASE=base is not None,
        ENDS=tuple(span.stop for span in shape.spans),
        HALF=leaves // 2,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return y
