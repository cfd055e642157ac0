# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""Triton helpers: where the values of a few columns lie, and how they become dense columns.

A thread owns eight consecutive columns of one row; the lanes of a warp own consecutive stretches, so that their
values are neighbours in memory although nobody knows their places before the mask is read. Everything here works on
one row at a time in one-dimensional tensors: then a lane's place does not depend on which layout the compiler likes.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def pick(layers, ends, program):
    """(layer, program): the layer that a program works on, a tuple, and its number among the programs of that layer.

    `ends`: for each layer, the number of the first program after its own.
    """
    layer, first = layers[0], 0
    for i in tl.static_range(1, len(layers)):
        later = program >= ends[i - 1]
        chosen = ()
        for j in tl.static_range(len(layer)):
            chosen = chosen + (tl.where(later, layers[i][j], layer[j]),)
        layer = chosen
        first = tl.where(later, ends[i - 1], first)
    return layer, program - first


@triton.jit
def bit(bits, position: tl.constexpr):
    """bits & (1 << position), opaque to the compiler, which else packs such tests into vectors and unpacks them."""
    if INTERPRETED:
        return bits & (1 << position)
    chosen = tl.full(bits.shape, 1 << position, tl.int32)
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [bits, chosen], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def popcount(word):
    """Bits set in each uint64; in this form it compiles to the instruction (two of 32 bits)."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((word * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def column_bits(lane):
    """(shift, below): the first column of a lane inside its 64-column word, and the bits before it."""
    shift = ((lane * 8) % 64).to(tl.uint64)
    return shift, (tl.full(lane.shape, 1, tl.uint64) << shift) - 1


@triton.jit
def row_start(starts, row, blocks, PER_BLOCK: tl.constexpr):
    """The place of a row's first value."""
    if PER_BLOCK:
        return row * blocks * PER_BLOCK
    return tl.load(starts + row)


@triton.jit
def read(at, inside, EVEN: tl.constexpr):
    """What lies at `at`; 0 outside. EVEN: nothing is outside."""
    return tl.load(at) if EVEN else tl.load(at, mask=inside, other=0)


@triton.jit
def read_head(words, offsets, row, block, blocks, PER_BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """(word, offset): the mask word that a lane's columns lie in, and the values of the row before it."""
    at = row * blocks + block
    inside = block < blocks
    word = read(words.to(tl.pointer_type(tl.uint64)) + at, inside, EVEN)
    if PER_BLOCK:
        return word, block * PER_BLOCK
    offset = read(offsets + at, inside, EVEN)
    if offsets.dtype.element_ty == tl.int16:
        offset = offset.to(tl.uint16, bitcast=True).to(tl.int32)
    return word, offset


@triton.jit
def locate(words, offsets, start, row, block, shift, below, blocks, PER_BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """(bits, place): a lane's mask bits from its first column on, and the place of the first value they stand for."""
    word, offset = read_head(words, offsets, row, block, blocks, PER_BLOCK, EVEN)
    return (word >> shift).to(tl.int32), start + offset + popcount(word & below)


# PTX: $0, the 16 bits that lie $2 bytes after $1, or 0 where $3 is, and above them those $4 after $1, or 0 where $5 is.
_LOAD_TWO = tl.constexpr("""{ .reg .pred p; .reg .b64 at; .reg .b16 low, high;
cvt.u64.u32 at, $2; add.s64 at, at, $1; setp.ne.b32 p, $3, 0; mov.b16 low, 0; @p ld.global.u16 low, [at];
cvt.u64.u32 at, $4; add.s64 at, at, $1; setp.ne.b32 p, $5, 0; mov.b16 high, 0; @p ld.global.u16 high, [at];
mov.b32 $0, {low, high}; }""")


@triton.jit
def expand(values, bits, place):
    """The dense entries of a lane's columns, eight tensors; their values lie in order from `place` on."""
    entries = ()
    if INTERPRETED or values.dtype.element_ty == tl.float32:
        for j in tl.static_range(8):
            kept = bit(bits, j)
            entries = entries + (tl.load(values + place, mask=kept != 0, other=0),)
            place += kept >> j
    else:  # with places in bytes and two columns a register: fewer integer instructions
        start, offset = values.to(tl.int64), place * 2
        for j in tl.static_range(0, 8, 2):
            low, high = bit(bits, j), bit(bits, j + 1)
            after = offset + (low >> (j - 1) if j > 0 else low * 2)
            pair = tl.inline_asm_elementwise(
                _LOAD_TWO,
                "=&r,l,r,r,r,r",
                [start, offset, low, after, high],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
            entries = entries + (pair.to(tl.int16).to(values.dtype.element_ty, bitcast=True),)
            entries = entries + ((pair >> 16).to(tl.int16).to(values.dtype.element_ty, bitcast=True),)
            offset = after + (high >> j)
    return entries


@triton.jit
def read_eight(row, column, ins, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """Eight neighbours in a row of `ins`, in FP32; 0 outside. WIDE: of 16 bits, aligned to 8 bytes, in eights."""
    entries = ()
    if WIDE:
        for half in tl.static_range(2):
            at = row.to(tl.pointer_type(tl.int64)) + column // 4 + half
            word = read(at, column < ins, EVEN)
            for j in tl.static_range(4):
                entry = (word >> (16 * j)).to(tl.int16).to(row.dtype.element_ty, bitcast=True)
                entries = entries + (entry.to(tl.float32),)
    else:
        for j in tl.static_range(8):
            entries = entries + (read(row + column + j, column + j < ins, EVEN).to(tl.float32),)
    return entries


@triton.jit
def read_pairs(words, values, at, inside, EVEN: tl.constexpr):
    """(bits, pairs): eight columns of a 2:4 mask, and their four values as one int64."""
    packed = values.to(tl.pointer_type(tl.int64))
    return read(words + at, inside, EVEN).to(tl.int32), read(packed + at, inside, EVEN)


@triton.jit
def expand_pairs(pairs, bits, DTYPE: tl.constexpr):
    """The dense entries of eight columns that keep two of each four. `pairs`: int64, four values in order."""
    entries = ()
    for group in tl.static_range(2):
        first = (pairs >> (32 * group)).to(tl.int16)
        second = (pairs >> (32 * group + 16)).to(tl.int16)
        b0 = bit(bits, 4 * group) != 0
        b1 = bit(bits, 4 * group + 1) != 0
        b2 = bit(bits, 4 * group + 2) != 0
        b3 = bit(bits, 4 * group + 3) != 0
        zero = tl.zeros_like(first)
        group_entries = (
            tl.where(b0, first, zero),
            tl.where(b1, tl.where(b0, second, first), zero),
            tl.where(b2, tl.where(b3, first, second), zero),
            tl.where(b3, second, zero),
        )
        for j in tl.static_range(4):
            entries = entries + (group_entries[j].to(DTYPE, bitcast=True),)
    return entries


@triton.jit
def stack(parts):
    """Equal tensors (a power of two of them) along a new last dimension, in order; stays in registers."""
    shape: tl.constexpr = parts[0].shape + [len(parts)]
    for _ in tl.static_range(8):  # halvings: up to 256 parts
        if len(parts) > 1:
            joined = ()
            for i in tl.static_range(len(parts) // 2):
                joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
            parts = joined
    return parts[0].reshape(shape)


@triton.jit
def multiply(left, right, total):
    """total + left @ right on the tensor cores, or in FP32 where the interpreter would read BF16 as integers."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total, input_precision="ieee")
