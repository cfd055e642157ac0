"""y = x S^T + (x A^T) B^T + bias for 17 to 256 rows of x, S unpacked tile by tile for the tensor cores (Triton).

With fewer rows a tile of S has too few products (`small_batch`); with more, writing S once and reading it again costs
next to nothing (`unpack_then_gemm`). A program unpacks a tile of S in registers and hands it to the tensor cores
through shared memory. x A^T is a dense product of its own; B joins as more columns of S.

More than 32 rows of x are the left factor of the tensor cores' product, which then reads both factors from shared
memory, so that two stages of loads can be under way. Fewer are the right one, as the left must have 64 rows; then S is
read from registers, and there is one stage: with more, Triton 3.6 leaves products waiting in registers that the next
tile takes (128 x 128 with 256 rows of x gave wrong sums). The room's NOTES.md has the measurements.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..cuda.low_rank import with_factors_and_parts
from ..launch import TritonLaunch, Varying
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from ..program import PerRows, Program
from ..support_index import index_of
from .decode import can_pair, ceil_div, spread
from .support import (
    column_bits,
    expand,
    expand_pairs,
    multiply,
    popcount,
    read,
    read_head,
    read_pairs,
    row_start,
    stack,
)

_WIDTH = 128  # columns of S at a time
_RANK = 64  # of B at a time
_BATCH = 128  # rows of x that share an unpacked tile
_FEW = 32  # of x: the right factor of the product


@triton.jit(do_not_specialize=["count"])
def _multiply(
    x,
    words,
    values,
    starts,
    offsets,
    B,
    u,
    bias,
    y,
    outs,
    ins,
    blocks,
    rank,
    count,
    span,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    lane = tl.arange(0, ROWS * (WIDTH // 8))
    chunk = lane % (WIDTH // 8)
    row = tl.minimum(first + lane // (WIDTH // 8), outs - 1)
    begin = row_start(starts, row, blocks, PER_BLOCK)
    shift, below = column_bits(chunk)
    sample = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    taken = tl.minimum(sample, count - 1)[:, None]
    total = tl.zeros((BATCH, ROWS) if SWAPPED else (ROWS, BATCH), tl.float32)
    start, end = split * span, tl.minimum(split * span + span, ins)
    last = (end - 1) // WIDTH * WIDTH
    head = _head(words, values, offsets, row, start, chunk, blocks, PER_BLOCK, PAIRS, EVEN)
    for k in range(start, end, WIDTH):
        now = head
        column = tl.minimum(k + WIDTH, last)
        head = _head(words, values, offsets, row, column, chunk, blocks, PER_BLOCK, PAIRS, EVEN)
        if PAIRS:
            entries = expand_pairs(now[1], now[0], values.dtype.element_ty)
        else:
            place = begin + now[1] + popcount(now[0] & below)
            entries = expand(values, (now[0] >> shift).to(tl.int32), place)
        column = k + tl.arange(0, WIDTH)[None, :]
        tile = stack(entries).reshape(ROWS, WIDTH)
        total = _add(tile, read(x + taken * ins + column, column < ins, EVEN), total, SWAPPED)
    out = first + tl.arange(0, ROWS)
    if LOW_RANK:
        at = tl.minimum(out, outs - 1)[:, None] * rank
        for q in range(0, tl.where(split == 0, rank, 0), RANK):
            factor = q + tl.arange(0, RANK)[None, :]
            tile = tl.load(B + at + factor, mask=factor < rank, other=0)
            total = _add(tile, tl.load(u + taken * rank + factor, mask=factor < rank, other=0), total, SWAPPED)
    if SWAPPED:
        total = total.trans(1, 0)
    if BIAS:
        once = tl.load(bias + out, mask=out < tl.where(split == 0, outs, 0), other=0)
        total += once.to(tl.float32)[:, None]
    at = y + (split * count + sample)[None, :].to(tl.int64) * outs + out[:, None]
    tl.store(at, total, mask=(out < outs)[:, None] & (sample < count)[None, :])


@triton.jit
def _add(tile, x, total, SWAPPED: tl.constexpr):
    """total + tile @ x^T, the transposes where SWAPPED: (rows of S, columns), (rows of x, columns)."""
    return multiply(x, tile.trans(1, 0), total) if SWAPPED else multiply(tile, x.trans(1, 0), total)


@triton.jit
def _head(
    words,
    values,
    offsets,
    row,
    k,
    chunk,
    blocks,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """What a lane reads before it knows more: at 2:4 as `read_pairs`, else as `read_head`."""
    if PAIRS:
        at = row * (blocks * 8) + k // 8 + chunk
        head = read_pairs(words, values, at, k // 64 + chunk // 8 < blocks, EVEN)
    else:
        head = read_head(words, offsets, row, k // 64 + chunk // 8, blocks, PER_BLOCK, EVEN)
    return head


def bind_medium_batch(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """x S^T + (x A^T) B^T + bias of one weight of 16 bits, summed in FP32; x A^T is rounded once, as a product of
    torch's is. For up to `rows` rows of x, raised to a power of two."""
    (weight,) = weights
    mask, values, A, B, bias, ins = weight
    index, rank = index_of(mask, ins), weight.rank
    outs, blocks = index.shape
    span, split = spread(ins, _WIDTH, config.split)
    batch, few = min(_BATCH, max(16, 1 << (rows - 1).bit_length())), rows <= _FEW
    inputs, u = Varying(0, values.new_empty((1,))), Varying(1, values.new_empty((1,)))
    target = Varying(2, values.new_empty((1,), dtype=torch.float32 if split > 1 else values.dtype))
    arguments = (
        inputs, index.words(mask), values, index.starts, index.offsets, values if B is None else B, u,
        values if bias is None else bias, target, outs, ins, blocks, rank, Varying(3, rows), span,
    )  # fmt: skip
    constants = {
        "ROWS": config.rows, "BATCH": batch, "WIDTH": _WIDTH,
        "RANK": min(_RANK, max(16, 1 << (rank - 1).bit_length())), "PER_BLOCK": index.per_block,
        "PAIRS": can_pair(index, values), "EVEN": ins % _WIDTH == 0, "LOW_RANK": A is not None,
        "BIAS": bias is not None, "SWAPPED": not few, "num_warps": config.warps, "num_stages": 1 if few else 2,
    }  # fmt: skip
    programs = ceil_div(outs, config.rows)
    main = TritonLaunch(_multiply, (programs, split, ceil_div(rows, batch)), arguments, constants)
    grid = (programs, split, PerRows(1, batch))
    return with_factors_and_parts(rows, [weight], main, grid, split)
