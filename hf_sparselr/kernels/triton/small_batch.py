# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""Two to 16 rows of x against tiles of 16 packed rows of S on the tensor cores, without moving S (Triton).

A thread of the tensor cores holds rows g and g + 8 of a tile of S and row g of x, at the same columns; it shares these
rows with three neighbours. The order in which columns are summed is free: a thread owns eight neighbours of each 32
and unpacks them where they are multiplied. Each warp has its own columns, as one matrix of a batch; the
batch is summed at the end. One read of x serves `ROWS` rows of S.
"""

import triton
import triton.language as tl

from .support import (
    INTERPRETED,
    column_bits,
    expand,
    expand_pairs,
    multiply,
    pick,
    popcount,
    read,
    read_head,
    row_start,
    stack,
)

# Neighbouring columns of a thread that the compiler lays next to each other for the tensor cores. Any number gives the
# same product: with another one than it likes, it would shuffle S between threads.
_TOGETHER = tl.constexpr(4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2)


def _place_kept() -> tl.constexpr:
    """PTX: eight columns, in pairs $0 to $3, out of the three words of 64 bits $4 to $6 that their values lie in.

    $7 is the place of the first value, $8 the mask. Each kept column takes the lowest value and shifts the others down.
    """
    lines = [
        "{ .reg .pred p; .reg .b32 t, left, right, w<6>, out<4>;",
        "mov.b64 {w0, w1}, $4; mov.b64 {w2, w3}, $5; mov.b64 {w4, w5}, $6;",
        "and.b32 t, $7, 2; setp.ne.b32 p, t, 0; shl.b32 t, $7, 4;",
    ]
    lines += [f"selp.b32 w{i}, w{i + 1}, w{i}, p;" for i in range(5)]
    lines += [f"shf.r.wrap.b32 w{i}, w{i}, w{i + 1}, t;" for i in range(4)]
    for j in range(8):
        side, words = "right" if j % 2 else "left", (8 - j) // 2  # that hold what may be left
        lines.append(f"and.b32 t, $8, {1 << j}; setp.ne.b32 p, t, 0; selp.b32 {side}, w0, 0, p;")
        lines += [f"@p shf.r.wrap.b32 w{i}, w{i}, w{min(i + 1, 3)}, 16;" for i in range(words)]
        if j % 2:
            lines.append(f"prmt.b32 out{j // 2}, left, right, 0x5410;")
    lines += [f"mov.b32 ${i}, out{i};" for i in range(4)]  # not before all operands were read
    return tl.constexpr("\n".join([*lines, "}"]))


_PLACE = _place_kept()


@triton.jit
def multiply_tiles(
    x,
    layers,
    ends,
    ins,
    blocks,
    count,
    span,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    WARPS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    layer, program = pick(layers, ends, tl.program_id(0))
    words, values, starts, offsets, nonzeros, B, u, bias, y, outs, rank = layer
    STEP: tl.constexpr = 64 * WARPS
    first = program * ROWS
    split = tl.program_id(1)
    lane = tl.arange(0, 32 * WARPS)
    own, quarter = lane // 4 % 8, lane % 4
    within = lane // 32 * 64 + quarter * 8
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
        entries = _chunks(x, samples, start + within, ins, EVEN)
    for k in range(start, end, STEP):
        if AHEAD:
            now, right = heads, entries
            column = tl.minimum(k + STEP, last) + within
            heads = _heads(words, values, offsets, rows, column, blocks, PER_BLOCK, PAIRS, EVEN)
            entries = _chunks(x, samples, column, ins, EVEN)
        else:
            now = _heads(words, values, offsets, rows, k + within, blocks, PER_BLOCK, PAIRS, EVEN)
            right = _chunks(x, samples, k + within, ins, EVEN)
        left = ()
        for i in tl.static_range(ROWS // 8):
            left = left + (_unpack(values, nonzeros, now[i], begin[i], quarter, PAIRS, ALIGNED),)
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
def _unpack(values, nonzeros, head, begin, quarter, PAIRS: tl.constexpr, ALIGNED: tl.constexpr):
    """The dense entries of a lane's columns of one row: (lanes, 16)."""
    entries = ()
    for c in tl.static_range(2):
        shift, below = column_bits(quarter + 4 * c)
        bits = (head[0] >> shift).to(tl.int32)
        if PAIRS:
            entries = entries + expand_pairs(head[1 + c], bits, values.dtype.element_ty)
        else:
            place = begin + head[1] + popcount(head[0] & below)
            if ALIGNED and not INTERPRETED:
                entries = entries + _expand_aligned(values, bits, place, nonzeros)
            else:
                entries = entries + expand(values, bits, place)
    return stack(entries)


@triton.jit
def _expand_aligned(values, bits, place, nonzeros):
    """`expand` of eight columns, by three wide loads where eight would keep the cache busy with eight rows at once."""
    first, last = place >> 2, (nonzeros + 3) >> 2
    at = values.to(tl.pointer_type(tl.int64)) + first
    pairs = tl.inline_asm_elementwise(
        _PLACE,
        "=r,=r,=r,=r,l,l,l,r,r",
        [
            tl.load(at, mask=first < last),
            tl.load(at + 1, mask=first + 1 < last),
            tl.load(at + 2, mask=first + 2 < last),
            place,
            bits,
        ],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    entries = ()
    for i in tl.static_range(4):
        for side in tl.static_range(2):
            entry = (pairs[i] >> (16 * side)).to(tl.int16)
            entries = entries + (entry.to(values.dtype.element_ty, bitcast=True),)
    return entries


@triton.jit
def _chunks(x, samples, column, ins, EVEN: tl.constexpr):
    """The entries of x at a lane's columns, for each of its rows: (lanes, 8, 2)."""
    parts = ()
    for s in tl.static_range(len(samples)):
        start, chunks = x + samples[s][:, None] * ins, ()
        for c in tl.static_range(2):
            at = (column + 32 * c)[:, None] + tl.arange(0, 8)[None, :]
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


@triton.jit(do_not_specialize=["rows"])
def add_parts(parts, y, rows, out, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    """y (rows, out) = the sum of SPLIT parts."""
    size = rows * out
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * size + at, mask=at < size, other=0)
    tl.store(y + at, total, mask=at < size)
