# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""S or S + B A as a dense matrix in one pass, and the way back for gradients (Triton).

For many rows of x, where the dense product is bound by arithmetic: the dense matrix lives for one product.
"""

import torch
import triton
import triton.language as tl

from ..launch import TritonLaunch, Varying
from ..packed_weight import PackedWeight
from ..support_index import SupportIndex, index_of
from .decode import can_pair
from .support import bit, column_bits, expand, expand_pairs, locate, multiply, read_pairs, row_start, stack

_WARPS = 8  # each unpacks rows of its own: so many are a tile that the tensor cores add to
_STEPS, _STEPS_ADDING = 4, 1  # rows of a warp at a time, without and with B A
_BAND = 128  # output rows of a program that adds B A: it keeps its part of A for all of them
_RANK = 64  # of A at a time


@triton.jit
def unpack_band(
    program,
    words,
    values,
    starts,
    offsets,
    A,
    B,
    dense,
    outs,
    ins,
    pitch,
    blocks,
    rank,
    tiles,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    BAND: tl.constexpr,
    RANK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    ONE_STEP: tl.constexpr,
):
    """The rows and columns of a program: BAND rows, which lie `pitch` entries apart in `dense`, and 256 columns."""
    k = program % tiles * 256
    top = program // tiles * BAND
    lane = tl.arange(0, 32 * WARPS)
    shift, below = column_bits(lane % 32)
    block = k // 64 + lane % 32 // 8
    column = k + tl.arange(0, 256)
    if LOW_RANK and ONE_STEP:
        left = _transposed(A, column[:, None], 0, rank, ins, RANK)
    for first in range(top, tl.minimum(top + BAND, outs), STEPS * WARPS):
        parts = ()
        for i in tl.static_range(STEPS):
            row = tl.minimum(first + i * WARPS + lane // 32, outs - 1)
            if PAIRS:
                at = row * (blocks * 8) + k // 8 + lane % 32
                parts = parts + (read_pairs(words, values, at, k + lane % 32 * 8 < ins, EVEN),)
            else:
                start = row_start(starts, row, blocks, PER_BLOCK)
                part = locate(words, offsets, start, row, block, shift, below, blocks, PER_BLOCK, EVEN)
                parts = parts + (part,)
        unpacked = ()
        for i in tl.static_range(STEPS):
            if PAIRS:
                entries = expand_pairs(parts[i][1], parts[i][0], values.dtype.element_ty)
            else:
                entries = expand(values, parts[i][0], parts[i][1])
            unpacked = unpacked + (stack(entries).reshape(WARPS, 256),)
        for i in tl.static_range(STEPS):
            row = first + i * WARPS + tl.arange(0, WARPS)
            tile = unpacked[i]
            if LOW_RANK:
                total = tl.zeros((256, WARPS), tl.float32)
                if ONE_STEP:
                    total = multiply(left, _factors(B, row[None, :], 0, rank, outs, RANK), total)
                else:
                    for q in range(0, rank, RANK):
                        step = _transposed(A, column[:, None], q, rank, ins, RANK)
                        total = multiply(step, _factors(B, row[None, :], q, rank, outs, RANK), total)
                tile = tile.to(tl.float32) + total.to(tile.dtype).trans(1, 0).to(tl.float32)
            at = dense + row[:, None].to(tl.int64) * pitch + column[None, :]
            tl.store(at, tile, mask=(row < outs)[:, None] & (column < ins)[None, :])


@triton.jit
def _densify(
    words,
    values,
    starts,
    offsets,
    A,
    B,
    dense,
    outs,
    ins,
    blocks,
    rank,
    tiles,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    BAND: tl.constexpr,
    RANK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    ONE_STEP: tl.constexpr,
):
    unpack_band(
        tl.program_id(0), words, values, starts, offsets, A, B, dense, outs, ins, ins, blocks, rank, tiles,
        WARPS, STEPS, BAND, RANK, PER_BLOCK, PAIRS, EVEN, LOW_RANK, ONE_STEP,
    )  # fmt: skip


@triton.jit
def _transposed(A, column, q, rank, ins, RANK: tl.constexpr):
    """A^T for some columns: (columns, RANK)."""
    factor = q + tl.arange(0, RANK)[None, :]
    return tl.load(A + factor * ins + column, mask=(factor < rank) & (column < ins), other=0)


@triton.jit
def _factors(B, row, q, rank, outs, RANK: tl.constexpr):
    """B^T for some output rows: (RANK, rows)."""
    factor = q + tl.arange(0, RANK)[:, None]
    return tl.load(B + row * rank + factor, mask=(factor < rank) & (row < outs), other=0)


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
    PER_BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    shift, below = column_bits(lane)
    start = row_start(starts, row, blocks, PER_BLOCK)
    for k in range(0, ins, LANES * 8):
        block = k // 64 + lane // 8
        bits, place = locate(words, offsets, start, row, block, shift, below, blocks, PER_BLOCK, False)
        at = dense + row.to(tl.int64) * ins + k + lane * 8
        for j in tl.static_range(8):
            kept = bit(bits, j)
            tl.store(values + place, tl.load(at + j, mask=kept != 0, other=0), mask=kept != 0)
            place += kept >> j


def unpacking(ins: int, rank: int) -> dict[str, int | bool]:
    """Constants of `unpack_band` for so many columns and factors."""
    steps = _STEPS_ADDING if rank else _STEPS
    return {
        "WARPS": _WARPS, "STEPS": steps, "BAND": _BAND if rank else steps * _WARPS, "EVEN": ins % 256 == 0,
        "LOW_RANK": rank > 0, "ONE_STEP": rank <= _RANK, "RANK": min(_RANK, max(16, 1 << (rank - 1).bit_length())),
        "num_warps": _WARPS, "num_stages": 1,
    }  # fmt: skip


def bind_densify(weight: PackedWeight) -> TritonLaunch | None:
    """The launch that writes S + B A, at rank 0 S, to a tensor (out, in); None if that is empty.

    B A is rounded to the dtype before it is added, as a product of torch's would be.

    Args:
        weight: contiguous.
    """
    mask, values, A, B, _, ins = weight
    index, rank = index_of(mask, ins), weight.rank
    outs, blocks = index.shape
    if not (outs and ins):
        return None
    tiles = -(-ins // 256)
    A, B = (A, B) if rank else (values, values)
    arguments = (
        index.words(mask), values, index.starts, index.offsets, A, B, Varying(0, values.new_empty((1,))), outs, ins,
        blocks, rank, tiles,
    )  # fmt: skip
    constants = unpacking(ins, rank) | {"PER_BLOCK": index.per_block, "PAIRS": can_pair(index, values)}
    programs = tiles * -(-outs // constants["BAND"])
    return TritonLaunch(_densify, (programs,), arguments, constants)


def densify(weight: PackedWeight, launch: TritonLaunch | None) -> torch.Tensor:
    """S + B A as a new tensor (out, in), by `bind_densify` of the weight."""
    dense = weight.values.new_empty((weight.out_features, weight.in_features))
    if launch is not None:
        launch(dense)
    return dense


def collect(mask: torch.Tensor, index: SupportIndex, dense: torch.Tensor) -> torch.Tensor:
    """The entries of a dense matrix (out, in) on the support, in the order of `values`: (nonzeros,)."""
    outs, blocks = index.shape
    values = dense.new_empty(index.nonzeros)
    if not index.nonzeros:
        return values
    _collect[(outs,)](
        dense.contiguous(), index.words(mask), index.starts, index.offsets, values, index.in_features, blocks,
        LANES=32 * _WARPS, PER_BLOCK=index.per_block, num_warps=_WARPS,
    )  # fmt: skip
    return values
