# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""Up to 16 rows of x against packed rows of S, unpacked to tiles that the tensor cores multiply (Triton)."""

import triton
import triton.language as tl

from .support import column_bits, expand, expand_pairs, locate, multiply, read_pairs, row_start, stack


@triton.jit
def dense_tile(
    words,
    values,
    starts,
    offsets,
    first,
    k,
    outs,
    ins,
    blocks,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Columns k... of S^T for output rows first...: (LANES * COLUMNS, ROWS), in the dtype of the values."""
    lane = tl.arange(0, LANES)
    shift, below = column_bits(lane, COLUMNS)
    block = k // 64 + lane * COLUMNS // 64
    tile = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, outs - 1)
        if PAIRS:
            at = row * (blocks * 8) + k // 8 + lane
            bits, pairs = read_pairs(words, values, at, k + lane * 8 < ins, EVEN)
            entries = expand_pairs(pairs, bits, values.dtype.element_ty)
        else:
            start = row_start(starts, row, blocks, PER_BLOCK)
            bits, place = locate(words, offsets, start, row, block, shift, below, blocks, PER_BLOCK, EVEN)
            entries, _ = expand(values, bits, place, COLUMNS)
        tile = tile + (stack(entries),)
    return stack(tile).reshape(LANES * COLUMNS, ROWS)


@triton.jit
def multiply_matrix(
    x,
    words,
    values,
    starts,
    offsets,
    u,
    B,
    bias,
    y,
    outs,
    ins,
    blocks,
    rank,
    count,
    span,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BATCH: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    part = tl.program_id(1)
    sample = tl.arange(0, BATCH)[:, None]
    out = first + tl.arange(0, ROWS)[None, :]
    inner = tl.arange(0, LANES * COLUMNS)[None, :]
    present = (sample < count) & (out < outs)
    total = tl.zeros((BATCH, ROWS), tl.float32)
    for k in range(part * span, tl.minimum(part * span + span, ins), LANES * COLUMNS):
        tile = dense_tile(
            words, values, starts, offsets, first, k, outs, ins, blocks,
            ROWS, LANES, COLUMNS, PER_BLOCK, PAIRS, EVEN,
        )  # fmt: skip
        inside = sample < count if EVEN else (sample < count) & (k + inner < ins)
        total = multiply(tl.load(x + sample * ins + k + inner, mask=inside, other=0), tile, total)
    if part == 0:
        if LOW_RANK:
            if DEPENDENT:
                tl.extra.cuda.gdc_wait()
            for q in range(0, rank, 32):
                factor = q + tl.arange(0, 32)
                inside = (factor < rank)[None, :] & (sample < count)
                left = tl.load(u + sample * rank + factor[None, :], mask=inside, other=0)
                inside = (factor < rank)[:, None] & (out < outs)
                right = tl.load(B + out * rank + factor[:, None], mask=inside, other=0)
                total = multiply(left.to(right.dtype), right, total)
        if BIAS:
            total += tl.load(bias + out, mask=out < outs, other=0).to(tl.float32)
    tl.store(y + (part * count + sample) * outs + out, total, mask=present)


@triton.jit
def add_parts(parts, y, size, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * size + at, mask=at < size, other=0)
    tl.store(y + at, total, mask=at < size)
