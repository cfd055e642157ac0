# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""Two to 16 rows of x against tiles of 16 packed rows of S on the tensor cores, without moving S (Triton).

A thread of the tensor cores holds rows g and g + 8 of a tile of S and row g of x, at the same columns; it shares these
rows with three neighbours. In which order columns are contracted is nobody's business: a thread owns `COLUMNS` that
are consecutive, of four times as many, and unpacks them where they are multiplied. Each warp has its own columns, as
one matrix of a batch; the batch is summed at the end. One read of x serves `ROWS` rows of S.
"""

import triton
import triton.language as tl

from .support import (
    INTERPRETED,
    bit,
    column_bits,
    expand_pairs,
    multiply,
    popcount,
    read,
    read_head,
    row_start,
    stack,
)

# Neighbouring columns of a thread that the compiler lays next to each other for the tensor cores. Any number gives the
# same product: with another one than it likes, it would shuffle S between threads.
_TOGETHER = tl.constexpr(4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2)


@triton.jit
def multiply_tiles(
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
    BATCH: tl.constexpr,
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
    STEP: tl.constexpr = 64 * WARPS
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    lane = tl.arange(0, 32 * WARPS)
    own, quarter = lane // 4 % 8, lane % 4
    within = lane // 32 * 64 + quarter * COLUMNS
    start, end = split * span, tl.minimum(split * span + span, ins)
    rows, begin, sums = (), (), ()
    for i in tl.static_range(ROWS // 8):
        row = tl.minimum(first + 8 * i + own, outs - 1)
        rows = rows + (row,)
        begin = begin + (row_start(starts, row, blocks, PER_BLOCK),)
    for _ in tl.static_range(ROWS // 16 * (BATCH // 8)):
        sums = sums + (tl.zeros((WARPS, 16, 8), tl.float32),)
    samples = ()
    for s in tl.static_range(BATCH // 8):
        samples = samples + (tl.minimum(8 * s + own, count - 1),)
    last = start + (end - start - 1) // STEP * STEP
    if AHEAD:
        heads = _heads(words, values, offsets, rows, start + within, blocks, PER_BLOCK, PAIRS, EVEN)
        entries = _chunks(x, samples, start + within, ins, COLUMNS, EVEN)
    for k in range(start, end, STEP):
        if AHEAD:
            now, right = heads, entries
            column = tl.minimum(k + STEP, last) + within
            heads = _heads(words, values, offsets, rows, column, blocks, PER_BLOCK, PAIRS, EVEN)
            entries = _chunks(x, samples, column, ins, COLUMNS, EVEN)
        else:
            now = _heads(words, values, offsets, rows, k + within, blocks, PER_BLOCK, PAIRS, EVEN)
            right = _chunks(x, samples, k + within, ins, COLUMNS, EVEN)
        left = ()
        for i in tl.static_range(ROWS // 8):
            left = left + (_unpack(values, now[i], begin[i], quarter, COLUMNS, PAIRS),)
        sums = _accumulate(sums, left, right, WARPS)
    if LOW_RANK:
        for q in range(0, tl.where(split == 0, rank, 0), 32 * WARPS):
            factor = (q + lane // 32 * 32 + quarter * 8)[:, None] + tl.arange(0, 8)[None, :]
            left, right = (), ()
            for i in tl.static_range(ROWS // 8):
                at = B + rows[i][:, None] * rank + factor
                left = left + (tl.load(at, mask=factor < rank, other=0).to(tl.float32),)
            if DEPENDENT:
                tl.extra.cuda.gdc_wait()  # from here on u is complete
            for s in tl.static_range(BATCH // 8):
                at = u + samples[s][:, None] * rank + factor
                right = right + (tl.load(at, mask=factor < rank, other=0),)
            for m in tl.static_range(1 if B.dtype.element_ty == tl.bfloat16 else 2):
                for n in tl.static_range(2):
                    sums = _accumulate(sums, _term(left, m), _term(right, n), WARPS)
    part = tl.arange(0, len(sums))[None, None, :]
    out = first + part // (BATCH // 8) * 16 + tl.arange(0, 16)[:, None, None]
    sample = part % (BATCH // 8) * 8 + tl.arange(0, 8)[None, :, None]
    total = tl.sum(stack(sums), 0)
    if BIAS:
        total += tl.load(bias + out, mask=out < tl.where(split == 0, outs, 0), other=0).to(tl.float32)
    tl.store(y + (split * count + sample) * outs + out, total, mask=(out < outs) & (sample < count))


@triton.jit
def _heads(
    words,
    values,
    offsets,
    rows,
    column,
    blocks,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """What a lane reads of each of its rows before it knows more: `read_head`, and the values of 2:4."""
    heads, block = (), column // 64
    for i in tl.static_range(len(rows)):
        head = read_head(words, offsets, rows[i], block, blocks, PER_BLOCK, EVEN)
        if PAIRS:
            at = values.to(tl.pointer_type(tl.int64)) + rows[i] * (blocks * 8) + column // 8
            head = (head[0], read(at, block < blocks, EVEN), read(at + 4, block < blocks, EVEN))
        heads = heads + (head,)
    return heads


@triton.jit
def _unpack(values, head, begin, quarter, COLUMNS: tl.constexpr, PAIRS: tl.constexpr):
    """The dense entries of a lane's columns of one row: (lanes, 16)."""
    entries = ()
    for c in tl.static_range(16 // COLUMNS):
        shift, below = column_bits(quarter + 4 * c, COLUMNS)
        bits = (head[0] >> shift).to(tl.int32)
        if PAIRS:
            entries = entries + expand_pairs(head[1 + c], bits, values.dtype.element_ty)
        else:
            place = begin + head[1] + popcount(head[0] & below)
            for j in tl.static_range(COLUMNS):
                kept = bit(bits, j)
                entries = entries + (_take(values + place, kept),)
                place += kept >> j
    return stack(entries)


@triton.jit
def _take(at, kept):
    """The values at `at` where kept, else 0, each in a register of 32 bits: a zero for one of 16 is an instruction."""
    if INTERPRETED:
        return tl.load(at, mask=kept != 0, other=0)
    taken = tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.u16 $0, [$1]; }", "=r,l,r",
        [at.to(tl.int64), kept], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    return taken.to(tl.int16).to(at.dtype.element_ty, bitcast=True)


@triton.jit
def _chunks(x, samples, column, ins, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """The entries of x at a lane's columns, for each of its rows: (lanes, COLUMNS, chunks)."""
    parts = ()
    for s in tl.static_range(len(samples)):
        start, chunks = x + samples[s][:, None] * ins, ()
        for c in tl.static_range(16 // COLUMNS):
            at = (column + 4 * COLUMNS * c)[:, None] + tl.arange(0, COLUMNS)[None, :]
            chunks = chunks + (read(start + at, at < ins, EVEN),)
        parts = parts + (stack(chunks),)
    return parts


@triton.jit
def _term(parts, TERM: tl.constexpr):
    """The first or second term of parts as sums of two BF16: exact for FP16, and as wide as FP32."""
    terms = ()
    for i in tl.static_range(len(parts)):
        term = parts[i].to(tl.bfloat16)
        if TERM == 1:
            term = (parts[i] - term.to(tl.float32)).to(tl.bfloat16)
        terms = terms + (term,)
    return terms


@triton.jit
def _accumulate(sums, left, right, WARPS: tl.constexpr):
    """sums + left right^T. By eight rows, a lane's entries: of left (lanes, all), of right (lanes, chunk, chunks)."""
    ALL: tl.constexpr = left[0].shape[1]
    CHUNK: tl.constexpr = right[0].shape[1]
    columns, updated = (), ()
    for s in tl.static_range(len(right)):
        part = right[s].reshape(WARPS, 8, 4, CHUNK // _TOGETHER, _TOGETHER, ALL // CHUNK)
        columns = columns + (part.permute(0, 5, 3, 2, 4, 1).reshape(WARPS, 4 * ALL, 8),)
    for i in tl.static_range(len(left) // 2):
        tile = tl.join(left[2 * i], left[2 * i + 1]).reshape(WARPS, 8, 4, ALL // _TOGETHER, _TOGETHER, 2)
        tile = tile.permute(0, 5, 1, 3, 2, 4).reshape(WARPS, 16, 4 * ALL)
        for s in tl.static_range(len(right)):
            updated = updated + (multiply(tile, columns[s], sums[i * len(right) + s]),)
    return updated


@triton.jit
def add_parts(parts, y, size, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    """y = the sum of SPLIT parts."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * size + at, mask=at < size, other=0)
    tl.store(y + at, total, mask=at < size)
