# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""One row of x against packed rows of S in FP32 registers (Triton): for values of 32 bits, and one row of 16 bits.

With an unstructured S it waits for integer arithmetic, not for memory; the room's NOTES.md has the measurements.
"""

import triton
import triton.language as tl

from .support import (
    INTERPRETED,
    bit,
    column_bits,
    expand,
    locate,
    pick,
    read_eight,
    read_pairs,
    row_start,
    stack,
)


def _load_kept(widen: str) -> tl.constexpr:
    """PTX: $0, FP32, the 16 bits that lie $2 bytes after $1; 0 where $3 is."""
    return tl.constexpr(f"""{{ .reg .pred p; .reg .b64 at; .reg .b32 word; .reg .b16 half;
cvt.u64.u32 at, $2; add.s64 at, at, $1; setp.ne.b32 p, $3, 0; mov.b32 word, 0; @p ld.global.u16 word, [at];
{widen} }}""")


_LOAD_BF16 = _load_kept("shl.b32 word, word, 16; mov.b32 $0, word;")
_LOAD_FP16 = _load_kept("cvt.u16.u32 half, word; cvt.f32.f16 $0, half;")


@triton.jit
def multiply_vector(
    x,
    layers,
    ends,
    ins,
    blocks,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    layer, program = pick(layers, ends, tl.program_id(0))
    words, values, starts, offsets, _nonzeros, B, u, bias, y, outs, rank = layer
    first = program * ROWS
    sample = tl.program_id(1)
    lane = tl.arange(0, LANES)
    shift, below = column_bits(lane)
    sums, begin, ahead = (), (), ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, outs - 1)
        sums = sums + (tl.zeros((LANES,), tl.float32),)
        begin = begin + (row_start(starts, row, blocks, PER_BLOCK),)
        if LOW_RANK:  # asked for early, so that it is here when the sums are done
            ahead = ahead + (tl.load(B + row * rank + lane, mask=lane < rank, other=0),)
    for k in range(0, ins, LANES * 8):
        samples = read_eight(x + sample * ins, k + lane * 8, ins, WIDE, EVEN)
        block = k // 64 + lane // 8
        updated = ()
        for i in tl.static_range(ROWS):
            row = tl.minimum(first + i, outs - 1)
            if PAIRS:
                at = row * (blocks * 8) + k // 8 + lane
                bits, pairs = read_pairs(words, values, at, k + lane * 8 < ins, EVEN)
                total = _multiply_pairs(sums[i], bits, pairs, samples, values.dtype.element_ty)
            else:
                bits, place = locate(words, offsets, begin[i], row, block, shift, below, blocks, PER_BLOCK, EVEN)
                total = _multiply_kept(sums[i], values, bits, place, samples)
            updated = updated + (total,)
        sums = updated
    if LOW_RANK:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()  # from here on u is complete
        for q in range(0, rank, LANES):
            inside = q + lane < rank
            factor = tl.load(u + sample * rank + q + lane, mask=inside, other=0)
            updated = ()
            for i in tl.static_range(ROWS):
                row = tl.minimum(first + i, outs - 1)
                entry = ahead[i]
                if q > 0:
                    entry = tl.load(B + row * rank + q + lane, mask=inside, other=0)
                updated = updated + (sums[i] + entry.to(tl.float32) * factor,)
            sums = updated
    result = tl.sum(stack(sums), 0)
    out = first + tl.arange(0, ROWS)
    if BIAS:
        result += tl.load(bias + out, mask=out < outs, other=0).to(tl.float32)
    tl.store(y + sample * outs + out, result, mask=out < outs)


@triton.jit
def _multiply_kept(total, values, bits, place, samples):
    """Adds eight columns of a row, whose values lie in order from `place` on.

    Spelled out for 16 bits, with places in bytes and values in whole registers: a quarter fewer integer instructions.
    """
    if INTERPRETED or values.dtype.element_ty == tl.float32:
        entries = expand(values, bits, place)
        for j in tl.static_range(8):
            total += entries[j].to(tl.float32) * samples[j]
    else:
        start, offset = values.to(tl.int64), place * 2
        for j in tl.static_range(8):
            kept = bit(bits, j)
            entry = tl.inline_asm_elementwise(
                _LOAD_BF16 if values.dtype.element_ty == tl.bfloat16 else _LOAD_FP16,
                "=&f,l,r,r",
                [start, offset, kept],
                dtype=tl.float32,
                is_pure=False,
                pack=1,
            )
            total += entry * samples[j]
            offset += kept >> (j - 1) if j > 0 else kept * 2  # `kept * 2 >> j` takes one instruction more
    return total


@triton.jit
def _multiply_pairs(total, bits, pairs, samples, dtype: tl.constexpr):
    """Adds eight columns of a 2:4 row: both values of a group pick their entry of x."""
    for group in tl.static_range(2):
        x0, x1 = samples[4 * group], samples[4 * group + 1]
        x2, x3 = samples[4 * group + 2], samples[4 * group + 3]
        left = tl.where((bits & (2 << 4 * group)) != 0, x1, x2)
        left = tl.where((bits & (1 << 4 * group)) != 0, x0, left)
        right = tl.where((bits & (4 << 4 * group)) != 0, x2, x1)
        right = tl.where((bits & (8 << 4 * group)) != 0, x3, right)
        total += (pairs >> 32 * group).to(tl.int16).to(dtype, bitcast=True).to(tl.float32) * left
        total += (pairs >> 32 * group + 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32) * right
    return total
