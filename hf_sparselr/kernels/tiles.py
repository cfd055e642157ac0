# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""Two to 16 rows of x against tiles of 16 packed rows of S on the tensor cores, without moving S (Triton).

A thread of the tensor cores holds rows g and g + 8 of a tile of S and row g of x, at the same columns; it shares these
rows with three neighbours. In which order columns are contracted is nobody's business: of every 32 columns, a thread
owns eight that are consecutive, and unpacks them where they are multiplied. Each warp has its own columns, as one
matrix of a batch; the batch is summed at the end. One read of x serves `ROWS` rows of S.
"""

import triton
import triton.language as tl

from .support import column_bits, expand, expand_pairs, multiply, popcount, read_head, row_start, stack

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
    STEP: tl.constexpr = 4 * WARPS * COLUMNS
    first = tl.program_id(0) * ROWS
    lane = tl.arange(0, 32 * WARPS)
    own, quarter = lane // 4 % 8, lane % 4
    within = lane // 32 * (4 * COLUMNS) + quarter * 8
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
    last = (ins - 1) // STEP * STEP
    if AHEAD:
        heads = _heads(words, values, offsets, rows, within, blocks, COLUMNS, PER_BLOCK, PAIRS, EVEN)
        entries = _eights(x, samples, within, ins, COLUMNS, EVEN)
    for k in range(0, ins, STEP):
        if AHEAD:
            now, right = heads, entries
            column = tl.minimum(k + STEP, last) + within
            heads = _heads(words, values, offsets, rows, column, blocks, COLUMNS, PER_BLOCK, PAIRS, EVEN)
            entries = _eights(x, samples, column, ins, COLUMNS, EVEN)
        else:
            now = _heads(words, values, offsets, rows, k + within, blocks, COLUMNS, PER_BLOCK, PAIRS, EVEN)
            right = _eights(x, samples, k + within, ins, COLUMNS, EVEN)
        left = ()
        for i in tl.static_range(ROWS // 8):
            left = left + (_unpack(values, now[i], begin[i], quarter, COLUMNS, PAIRS),)
        sums = _accumulate(sums, left, _stack_each(right), WARPS)
    if LOW_RANK:
        for q in range(0, rank, 32 * WARPS):
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
        total += tl.load(bias + out, mask=out < outs, other=0).to(tl.float32)
    tl.store(y + sample * outs + out, total, mask=(out < outs) & (sample < count))


@triton.jit
def _heads(
    words,
    values,
    offsets,
    rows,
    column,
    blocks,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """What a lane reads of each of its rows before it knows more: `read_head` of each word, and the values of 2:4."""
    heads = ()
    for i in tl.static_range(len(rows)):
        head = ()
        for w in tl.static_range(COLUMNS // 16):
            block = column // 64 + w
            word, offset = read_head(words, offsets, rows[i], block, blocks, PER_BLOCK, EVEN)
            if PAIRS:
                at = values.to(tl.pointer_type(tl.int64)) + rows[i] * (blocks * 8) + column // 8 + 8 * w
                if EVEN:
                    head = head + ((word, tl.load(at), tl.load(at + 4)),)
                else:
                    inside = block < blocks
                    head = head + (
                        (word, tl.load(at, mask=inside, other=0), tl.load(at + 4, mask=inside, other=0)),
                    )
            else:
                head = head + ((word, offset),)
        heads = heads + (head,)
    return heads


@triton.jit
def _unpack(values, head, begin, quarter, COLUMNS: tl.constexpr, PAIRS: tl.constexpr):
    """The dense entries of a lane's columns of one row: (lanes, COLUMNS)."""
    entries = ()
    for c in tl.static_range(COLUMNS // 8):
        word = head[c // 2][0]
        shift, below = column_bits(quarter + 4 * (c % 2), 8)
        bits = (word >> shift).to(tl.int32)
        if PAIRS:
            entries = entries + expand_pairs(head[c // 2][1 + c % 2], bits, values.dtype.element_ty)
        else:
            eight, _ = expand(values, bits, begin + head[c // 2][1] + popcount(word & below), 8)
            entries = entries + eight
    return stack(entries)


@triton.jit
def _eights(x, samples, column, ins, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """The entries of x at a lane's columns, for each of its rows: COLUMNS / 8 times (lanes, 8)."""
    parts = ()
    for s in tl.static_range(len(samples)):
        start, eights = x + samples[s][:, None] * ins, ()
        for c in tl.static_range(COLUMNS // 8):
            at = (column + 32 * c)[:, None] + tl.arange(0, 8)[None, :]
            eights = eights + (tl.load(start + at) if EVEN else tl.load(start + at, mask=at < ins, other=0),)
        parts = parts + (eights,)
    return parts


@triton.jit
def _stack_each(parts):
    stacked = ()
    for i in tl.static_range(len(parts)):
        stacked = stacked + (stack(parts[i]),)
    return stacked


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
    """sums + left right^T. By eight rows, a lane's entries: (lanes, columns), of right (lanes, 8, columns / 8)."""
    COLUMNS: tl.constexpr = left[0].shape[1]
    columns, updated = (), ()
    for s in tl.static_range(len(right)):
        part = right[s].reshape(WARPS, 8, 4, 8 // _TOGETHER, _TOGETHER, COLUMNS // 8)
        columns = columns + (part.permute(0, 5, 3, 2, 4, 1).reshape(WARPS, 4 * COLUMNS, 8),)
    for i in tl.static_range(len(left) // 2):
        tile = tl.join(left[2 * i], left[2 * i + 1]).reshape(WARPS, 8, 4, COLUMNS // _TOGETHER, _TOGETHER, 2)
        tile = tile.permute(0, 5, 1, 3, 2, 4).reshape(WARPS, 16, 4 * COLUMNS)
        for s in tl.static_range(len(right)):
            updated = updated + (multiply(tile, columns[s], sums[i * len(right) + s]),)
    return updated
