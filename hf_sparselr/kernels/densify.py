"""S + B A as a dense matrix in one pass, and the way back for gradients (Triton).

For many rows of x, where the dense product is bound by arithmetic: the dense matrix lives for one product.
"""

import torch
import triton
import triton.language as tl

from .decode import dense_tile
from .index import SupportIndex
from .support import bit, column_bits, locate, multiply, row_start

_ROWS = 16  # of a step
_BAND = 128  # output rows of a program: it keeps its part of A for all of them
_WARPS = 4
_COLUMNS = 4  # of a thread
_RANK = 64  # of A at a time


@triton.jit
def _densify(
    words,
    values,
    starts,
    offsets,
    A,
    B,
    dense,
    top,
    bottom,
    outs,
    ins,
    blocks,
    rank,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    ONE_STEP: tl.constexpr,
):
    k = tl.program_id(0) * (LANES * COLUMNS)
    column = k + tl.arange(0, LANES * COLUMNS)[:, None]
    start = top + tl.program_id(1) * BAND
    if LOW_RANK and ONE_STEP:
        left = _transposed(A, column, 0, rank, ins, RANK)
    for first in range(start, tl.minimum(start + BAND, bottom), ROWS):
        tile = dense_tile(
            words, values, starts, offsets, first, k, outs, ins, blocks,
            ROWS, LANES, COLUMNS, PER_BLOCK, False, EVEN,
        )  # fmt: skip
        row = first + tl.arange(0, ROWS)[None, :]
        if LOW_RANK:
            total = tl.zeros((LANES * COLUMNS, ROWS), tl.float32)
            if ONE_STEP:
                total = multiply(left, _factors(B, row, 0, rank, bottom, RANK), total)
            else:
                for q in range(0, rank, RANK):
                    step = _transposed(A, column, q, rank, ins, RANK)
                    total = multiply(step, _factors(B, row, q, rank, bottom, RANK), total)
            tile = tile.to(tl.float32) + total
        at = dense + (row - top).to(tl.int64) * ins + column
        tl.store(at, tile, mask=(row < bottom) & (column < ins))


@triton.jit
def _transposed(A, column, q, rank, ins, RANK: tl.constexpr):
    """A^T for some columns: (columns, RANK)."""
    factor = q + tl.arange(0, RANK)[None, :]
    return tl.load(A + factor * ins + column, mask=(factor < rank) & (column < ins), other=0)


@triton.jit
def _factors(B, row, q, rank, bottom, RANK: tl.constexpr):
    """B^T for some output rows: (RANK, rows)."""
    factor = q + tl.arange(0, RANK)[:, None]
    return tl.load(B + row * rank + factor, mask=(factor < rank) & (row < bottom), other=0)


@triton.jit
def _collect(
    dense,
    words,
    starts,
    offsets,
    values,
    ins,
    blocks,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    shift, below = column_bits(lane, COLUMNS)
    start = row_start(starts, row, blocks, PER_BLOCK)
    for k in range(0, ins, LANES * COLUMNS):
        block = k // 64 + lane * COLUMNS // 64
        bits, place = locate(words, offsets, start, row, block, shift, below, blocks, PER_BLOCK, False)
        at = dense + row.to(tl.int64) * ins + k + lane * COLUMNS
        for j in tl.static_range(COLUMNS):
            kept = bit(bits, j)
            tl.store(values + place, tl.load(at + j, mask=kept != 0, other=0), mask=kept != 0)
            place += kept >> j


def densify(
    mask: torch.Tensor,
    index: SupportIndex,
    values: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    top: int = 0,
    bottom: int | None = None,
) -> torch.Tensor:
    """Rows top...bottom (default: all) of S + B A as a new tensor (bottom - top, in); A None: of S.

    A new tensor costs nothing: the allocator hands the memory of the last layer's on, per stream.
    """
    outs, blocks = index.shape
    ins, bottom = index.in_features, outs if bottom is None else bottom
    values, rank = values.contiguous(), 0 if A is None else A.shape[0]
    dense = values.new_empty((bottom - top, ins))
    if dense.numel() == 0:
        return dense
    A, B = (A.contiguous(), B.contiguous()) if rank else (values, values)
    tile = 32 * _WARPS * _COLUMNS
    grid = (triton.cdiv(ins, tile), triton.cdiv(bottom - top, _BAND))
    _densify[grid](
        index.words(mask), values, index.starts, index.offsets, A, B, dense, top, bottom, outs, ins, blocks, rank,
        ROWS=_ROWS, BAND=_BAND, LANES=32 * _WARPS, COLUMNS=_COLUMNS, PER_BLOCK=index.per_block, EVEN=ins % tile == 0,
        LOW_RANK=bool(rank), RANK=min(_RANK, max(16, triton.next_power_of_2(rank))), ONE_STEP=rank <= _RANK,
        num_warps=_WARPS, num_stages=1,
    )  # fmt: skip
    return dense


def unpacked_product(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    index: SupportIndex,
    values: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
    slabs: int = 1,
) -> torch.Tensor:
    """x (S + B A)^T + bias by the dense product: (rows, in) to (rows, out).

    Args:
        slabs: parts of the output rows, one after the other: a slab that fits the L2 cache is never written to
            memory, but each product is smaller.
    """
    if slabs == 1:
        return torch.nn.functional.linear(inputs, densify(mask, index, values, A, B), bias)
    outs = index.shape[0]
    y = inputs.new_empty((len(inputs), outs))
    height = -(-outs // slabs // _BAND) * _BAND
    for top in range(0, outs, height):
        bottom = min(top + height, outs)
        weight = densify(mask, index, values, A, B, top, bottom)
        if bias is None:
            torch.mm(inputs, weight.T, out=y[:, top:bottom])
        else:
            torch.addmm(bias[top:bottom], inputs, weight.T, out=y[:, top:bottom])
    return y


def collect(mask: torch.Tensor, index: SupportIndex, dense: torch.Tensor) -> torch.Tensor:
    """The entries of a dense matrix (out, in) on the support, in the order of `values`: (nonzeros,)."""
    outs, blocks = index.shape
    values = dense.new_empty(index.nonzeros)
    if not index.nonzeros:
        return values
    _collect[(outs,)](
        dense.contiguous(), index.words(mask), index.starts, index.offsets, values, index.in_features, blocks,
        LANES=32 * _WARPS, COLUMNS=_COLUMNS, PER_BLOCK=index.per_block, num_warps=_WARPS,
    )  # fmt: skip
    return values
