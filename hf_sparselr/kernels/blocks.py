# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""One to eight rows of x against packed rows of S on the tensor cores, without moving S between threads (Triton).

A thread owns the same eight columns of every row of S. The tensor cores contract over a thread's values and its four
neighbours', and over nothing else: a warp's columns are eight blocks of 32. So both operands are indexed by the block:

    D[m, n] = sum over j of S[row, 32 m + j] x[32 n + j]

whose diagonal, summed, is the product of a row with x. One part in eight of the arithmetic is used, which is free: what
counts is that the values are neither converted nor exchanged. Two rows of S share one D of (16, 8).
"""

import triton
import triton.language as tl

from .support import (
    column_bits,
    expand,
    expand_pairs,
    multiply,
    popcount,
    read_head,
    read_pairs,
    row_start,
    stack,
)


@triton.jit
def multiply_blocks(
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
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    WARPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    LANES: tl.constexpr = 32 * WARPS
    groups = (count + SAMPLES - 1) // SAMPLES
    group = tl.program_id(0) % groups * SAMPLES  # its programs share rows of S: they run side by side
    first = tl.program_id(0) // groups * ROWS
    lane = tl.arange(0, LANES)
    _, below = column_bits(lane, COLUMNS)
    within = lane[:, None] * COLUMNS + tl.arange(0, 8)[None, :]
    sums, begin = (), ()
    for i in tl.static_range(ROWS):
        begin = begin + (row_start(starts, tl.minimum(first + i, outs - 1), blocks, PER_BLOCK),)
    for _ in tl.static_range(ROWS // 2 * SAMPLES):
        sums = sums + (tl.zeros((WARPS, 16, 8), tl.float32),)
    last = (ins - 1) // (LANES * COLUMNS) * (LANES * COLUMNS)
    if AHEAD:
        heads = _heads(words, offsets, first, 0, lane, outs, blocks, ROWS, COLUMNS, PER_BLOCK, EVEN)
    for k in range(0, ins, LANES * COLUMNS):
        places = ()
        if not PAIRS:
            if AHEAD:
                now = heads
                heads = _heads(
                    words, offsets, first, tl.minimum(k + LANES * COLUMNS, last), lane, outs, blocks,
                    ROWS, COLUMNS, PER_BLOCK, EVEN,
                )  # fmt: skip
            else:
                now = _heads(words, offsets, first, k, lane, outs, blocks, ROWS, COLUMNS, PER_BLOCK, EVEN)
            for i in tl.static_range(ROWS):
                places = places + (begin[i] + now[i][1] + popcount(now[i][0] & below),)
        for part in tl.static_range(COLUMNS // 8):
            column = k + within + 8 * part
            samples = ()
            for s in tl.static_range(SAMPLES):
                at = x + tl.minimum(group + s, count - 1) * ins + column
                entry = tl.load(at) if EVEN else tl.load(at, mask=column < ins, other=0)
                samples = samples + (_by_block(entry, WARPS).permute(0, 2, 1),)
            tiles, after = (), ()
            for i in tl.static_range(ROWS):
                row = tl.minimum(first + i, outs - 1)
                at = row * (blocks * 8) + k // 8 + lane * (COLUMNS // 8) + part
                inside = k + lane * COLUMNS < ins
                if PAIRS:
                    bits, pairs = read_pairs(words, values, at, inside, EVEN)
                    entries = expand_pairs(pairs, bits, values.dtype.element_ty)
                else:
                    # Read apart from the word that it is part of: shifting it out takes as long, and the compiler lays
                    # operands out for the tensor cores by the narrowest load behind them: for bytes, eight consecutive
                    # columns a thread, as they are.
                    byte = tl.load(words + at) if EVEN else tl.load(words + at, mask=inside, other=0)
                    entries, place = expand(values, byte.to(tl.int32), places[i], 8)
                    after = after + (place,)
                tiles = tiles + (_by_block(stack(entries), WARPS),)
            places = after
            sums = _accumulate(sums, tiles, samples, WARPS)
    out = first + tl.arange(0, ROWS)
    sample = group + tl.arange(0, SAMPLES)
    results = ()
    for s in tl.static_range(SAMPLES):
        pairs_of_rows = ()
        for i in tl.static_range(ROWS // 2):
            pairs_of_rows = pairs_of_rows + (_diagonal(sums[i * SAMPLES + s], WARPS),)
        results = results + (stack(pairs_of_rows).permute(1, 0).reshape(ROWS),)
    total = stack(results)
    if LOW_RANK:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()  # from here on u is complete
        for q in range(0, rank, 32):
            factor = q + tl.arange(0, 32)[None, :]
            inside = (out < outs)[:, None] & (factor < rank)
            left = tl.load(B + out[:, None] * rank + factor, mask=inside, other=0).to(tl.float32)
            inside = (sample < count)[:, None] & (factor < rank)
            right = tl.load(u + sample[:, None] * rank + factor, mask=inside, other=0)
            total += tl.sum(left[:, None, :] * right[None, :, :], 2)
    if BIAS:
        total += tl.load(bias + out, mask=out < outs, other=0).to(tl.float32)[:, None]
    present = (out < outs)[:, None] & (sample < count)[None, :]
    tl.store(y + sample[None, :] * outs + out[:, None], total, mask=present)


@triton.jit
def _heads(
    words,
    offsets,
    first,
    k,
    lane,
    outs,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """What leads to the places of each row's values at columns k...: see `read_head`."""
    heads = ()
    block = k // 64 + lane * COLUMNS // 64
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, outs - 1)
        heads = heads + (read_head(words, offsets, row, block, blocks, PER_BLOCK, EVEN),)
    return heads


@triton.jit
def _by_block(tile, WARPS: tl.constexpr):
    """(32 WARPS, 8), eight columns a thread, to (WARPS, 8 blocks, 32 columns). Moves nothing."""
    return tile.reshape(WARPS, 8, 32)


@triton.jit
def _accumulate(sums, tiles, samples, WARPS: tl.constexpr):
    """sums + tiles samples^T by block: two rows of S by one of x at a time."""
    updated = ()
    for i in tl.static_range(len(tiles) // 2):
        pair = tl.join(tiles[2 * i], tiles[2 * i + 1]).permute(0, 3, 1, 2).reshape(WARPS, 16, 32)
        for s in tl.static_range(len(samples)):
            updated = updated + (multiply(pair, samples[s], sums[i * len(samples) + s]),)
    return updated


@triton.jit
def _diagonal(total, WARPS: tl.constexpr):
    """The products of two rows of S, (2,), from D (WARPS, 16, 8)."""
    block = tl.arange(0, 16)[None, :, None] % 8
    kept = tl.where(block == tl.arange(0, 8)[None, None, :], total, 0.0)
    return tl.sum(tl.sum(kept.reshape(WARPS, 2, 64), 2), 0)
