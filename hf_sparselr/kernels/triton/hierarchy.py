"""Few rows of x against a hierarchical matrix in two launches (Triton); see kernels/hierarchy.py.

The first multiplies every leaf's columns of A by the leaf's inputs. The second adds the leaf's own product, which it
may begin before the first has ended, and B times the sums of the sibling's results. A, B and the leaves are read once.
Several rows of x go to the tensor cores together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...format.hierarchy import Hierarchy
from ..launch import TritonLaunch, Varying
from .decode import can_overlap, space
from .support import multiply


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the matrix that a program works on at a time, its warps and stages."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1


TILES = {  # of A, and of B and the leaves
    "one row": (Tile(8, 256), Tile(8, 256, warps=2)),
    "more rows": (Tile(32, 128, stages=4), Tile(16, 256, stages=4)),
}


@triton.jit
def _inputs(x, order, column, real, count, ins, PERMUTED: tl.constexpr, SAMPLES: tl.constexpr):
    """x at some positions: (columns,) of one row, else (columns, rows of x)."""
    if PERMUTED:
        column = tl.load(order + column, mask=real, other=0)
    if SAMPLES == 1:
        return tl.load(x + column, mask=real, other=0)
    else:
        sample = tl.arange(0, SAMPLES)
        at = x + sample[None, :] * ins + column[:, None]
        return tl.load(at, mask=real[:, None] & (sample[None, :] < count), other=0)


@triton.jit
def _add(total, entries, inputs, SAMPLES: tl.constexpr):
    """total + entries @ inputs; of one row of x, `total` keeps the products of every column apart."""
    if SAMPLES == 1:
        return total + entries.to(tl.float32) * inputs.to(tl.float32)[None, :]
    else:
        return multiply(entries, inputs, total)


@triton.jit
def _see(
    x,
    A,
    order,
    seen,
    count,
    ins,
    width,
    rank,
    leaves,
    PERMUTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    leaf, r = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS if SAMPLES == 1 else SAMPLES), tl.float32)
    for k in range(0, width, COLUMNS):
        inside = k + tl.arange(0, COLUMNS)
        column = leaf * width + inside
        real = (inside < width) & (column < ins)
        entries = tl.load(A + r[:, None] * ins + column[None, :], mask=(r[:, None] < rank) & real[None, :], other=0)
        total = _add(total, entries, _inputs(x, order, column, real, count, ins, PERMUTED, SAMPLES), SAMPLES)
    if SAMPLES == 1:
        tl.store(seen + leaf * rank + r, tl.sum(total, 1), mask=r < rank)
    else:
        sample = tl.arange(0, SAMPLES)
        at = seen + (sample[None, :] * leaves + leaf) * rank + r[:, None]
        tl.store(at, total, mask=(r[:, None] < rank) & (sample[None, :] < count))


@triton.jit
def _passed(seen, leaf, r, count, rank, leaves, ENDS: tl.constexpr, HALF: tl.constexpr, SAMPLES: tl.constexpr):
    """The sums over the sibling's leaves at some ranks: (ranks,) of one row of x, else (ranks, rows of x)."""
    shift = tl.zeros(r.shape, tl.int32)  # depth minus the level of every rank
    for level in tl.static_range(len(ENDS) - 1):
        shift += (r < ENDS[level]).to(tl.int32)
    first = ((leaf >> shift) ^ 1) << shift  # of the sibling's leaves
    if SAMPLES == 1:
        j = tl.arange(0, HALF)
        wanted = (r[None, :] < rank) & (j[:, None] < (1 << shift)[None, :])
        return tl.sum(tl.load(seen + (first[None, :] + j[:, None]) * rank + r[None, :], mask=wanted, other=0), 0)
    else:
        sample = tl.arange(0, SAMPLES)
        at = seen + (sample[None, :] * leaves + first[:, None]) * rank + r[:, None]
        real = (r[:, None] < rank) & (sample[None, :] < count)
        total = tl.zeros((r.shape[0], SAMPLES), tl.float32)
        for j in range(HALF):
            total += tl.load(at + j * rank, mask=real & (j < (1 << shift))[:, None], other=0)
        return total


@triton.jit
def _answer(
    x,
    seen,
    base,
    y,
    B,
    dense,
    row_order,
    column_order,
    count,
    ins,
    outs,
    height,
    width,
    rank,
    leaves,
    PERMUTED: tl.constexpr,
    BASE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ENDS: tl.constexpr,
    HALF: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    leaf, inside = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = leaf * height + inside
    real_row = (inside < height) & (row < outs)
    total = tl.zeros((ROWS, COLUMNS if SAMPLES == 1 else SAMPLES), tl.float32)
    for k in range(0, width, COLUMNS):
        place = k + tl.arange(0, COLUMNS)
        column = leaf * width + place
        real = (place < width) & (column < ins)
        at = dense + row[:, None] * width + place[None, :]
        entries = tl.load(at, mask=real_row[:, None] & real[None, :], other=0)
        inputs = _inputs(x, column_order, column, real, count, ins, PERMUTED, SAMPLES)
        total = _add(total, entries, inputs, SAMPLES)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()  # from here on `seen` is complete
    for q in range(0, rank, COLUMNS):
        r = q + tl.arange(0, COLUMNS)
        entries = tl.load(B + row[:, None] * rank + r[None, :], mask=real_row[:, None] & (r[None, :] < rank), other=0)
        passed = _passed(seen, leaf, r, count, rank, leaves, ENDS, HALF, SAMPLES)
        total = _add(total, entries, passed.to(entries.dtype) if SAMPLES > 1 else passed, SAMPLES)
    out = row
    if PERMUTED:
        out = tl.load(row_order + row, mask=real_row, other=0)
    if SAMPLES == 1:
        result = tl.sum(total, 1)
        if BASE:
            result += tl.load(base + out, mask=real_row, other=0).to(tl.float32)
        tl.store(y + out, result, mask=real_row)
    else:
        sample = tl.arange(0, SAMPLES)
        at = sample[None, :] * outs + out[:, None]
        real = real_row[:, None] & (sample[None, :] < count)
        if BASE:
            total += tl.load(base + at, mask=real, other=0).to(tl.float32)
        tl.store(y + at, total, mask=real)


Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def bind_few(hierarchy: Hierarchy, count: int, based: bool) -> Product:
    """x L^T, plus a base: (count, in), and (count, out) or None, to (count, out). Holds none of the hierarchy's memory.

    Args:
        hierarchy: L, contiguous.
        count: rows of x, 1 to 16.
        based: whether there is a base.
    """
    shape, A = hierarchy.shape, hierarchy.A
    (height, width), rank = shape.leaf, shape.rank
    leaves, permuted = 2**shape.depth, hierarchy.row_order is not None
    dependent = can_overlap(A.device)
    see, answer = TILES["one row" if count == 1 else "more rows"]
    x, seen = Varying(0, A.new_empty((1,))), Varying(1, A.new_empty((1,), dtype=torch.float32))
    row_order, column_order = (hierarchy.row_order, hierarchy.column_order) if permuted else (A, A)
    common = {"PERMUTED": permuted, "DEPENDENT": dependent, "SAMPLES": 1 if count == 1 else 16}
    first = TritonLaunch(
        _see,
        (leaves, -(-rank // see.rows)),
        (x, A, column_order, seen, count, shape.in_features, width, rank, leaves),
        {**common, **_options(see)},
    )
    sizes = count, shape.in_features, shape.out_features, height, width, rank, leaves
    base, y = (Varying(number, A.new_empty((1,))) for number in (2, 3))
    constants = {"BASE": based, "ENDS": tuple(span.stop for span in shape.spans), "HALF": leaves // 2}
    overlap = {"launch_pdl": True} if dependent else {}
    second = TritonLaunch(
        _answer,
        (leaves, -(-height // answer.rows)),
        (x, seen, base, y, hierarchy.B, hierarchy.leaves, row_order, column_order, *sizes),
        {**common, **constants, **_options(answer), **overlap},
    )
    out = shape.out_features

    def product(rows: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        (seen,) = space(rows, [count * leaves * rank], first)
        y = rows.new_empty((count, out))
        first(rows, seen)
        second(rows, seen, y if base is None else base, y)
        return y

    return product


def _options(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
