"""S of the experts that have rows as one dense tensor, and their factors, for torch's grouped product (Triton).

For many rows of x. Columns for B lie beside those of S, and columns for u = x A^T beside those of x: so one product
adds both parts.
"""

import functools

import torch
import triton
import triton.language as tl

from ..launch import TritonLaunch, Varying
from .decode import ceil_div
from .unpack import unpack_band, unpacking

ENTRIES = 13  # of an expert in a table (see `cuda.experts`)
_WIDTH = 1024  # columns that are copied at a time


@triton.jit
def _has_rows(ends, expert):
    before = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    return tl.load(ends + expert) > before


@triton.jit
def _unpack(
    table,
    ends,
    dense,
    outs,
    ins,
    pitch,
    blocks,
    tiles,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ENTRIES: tl.constexpr,
    EXTRA: tl.constexpr,
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
    expert = tl.program_id(1)
    program = tl.program_id(0)
    at = table + expert * ENTRIES
    if _has_rows(ends, expert):
        words = tl.load(at).to(tl.pointer_type(tl.uint8))
        values = tl.load(at + 1).to(tl.pointer_type(DTYPE))
        starts = tl.load(at + 2).to(tl.pointer_type(tl.int32))
        offsets = tl.load(at + 3).to(tl.pointer_type(WORD))
        target = dense + expert.to(tl.int64) * outs * pitch
        unpack_band(
            program, words, values, starts, offsets, values, values, target, outs, ins, pitch, blocks, 0, tiles,
            WARPS, STEPS, BAND, RANK, PER_BLOCK, PAIRS, EVEN, LOW_RANK, ONE_STEP,
        )  # fmt: skip
        if EXTRA > 0 and program % tiles == 0:  # B in the columns after those of S
            B = tl.load(at + 4).to(tl.pointer_type(DTYPE))
            rank = tl.load(at + 8).to(tl.int32)
            row = (program // tiles * BAND + tl.arange(0, BAND))[:, None]
            factor = tl.arange(0, EXTRA)[None, :]
            entry = tl.load(B + row * rank + factor, mask=(factor < rank) & (row < outs), other=0)
            inside = (factor < pitch - ins) & (row < outs)
            tl.store(target + row.to(tl.int64) * pitch + ins + factor, entry, mask=inside)


@triton.jit
def _collect_factors(table, ends, A, ins, extra, DTYPE: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    factor = tl.program_id(0)
    expert = tl.program_id(1)
    if _has_rows(ends, expert):
        own = tl.load(table + expert * ENTRIES + 12).to(tl.pointer_type(DTYPE))
        rank = tl.load(table + expert * ENTRIES + 8).to(tl.int32)
        target = A + (expert.to(tl.int64) * extra + factor) * ins
        for k in range(0, ins, WIDTH):
            column = k + tl.arange(0, WIDTH)
            entry = tl.load(own + factor * ins + column, mask=column < tl.where(factor < rank, ins, 0), other=0)
            tl.store(target + column, entry, mask=column < ins)


class Unpacking:
    """Makes the dense tensors of a table's experts. Those of experts without rows hold anything.

    Args:
        table: int64 (experts, 13), as the kernels in CUDA C++ read it.
        rank: the largest.
        pairs, per_block: see `SupportIndex`.

    Attributes:
        extra: columns for the factors, a multiple of 8.
    """

    def __init__(
        self,
        table: torch.Tensor,
        sizes: tuple[int, int, int, int],
        rank: int,
        pairs: bool,
        per_block: int,
        dtype: torch.dtype,
    ) -> None:
        self.experts, self.outs, self.ins, blocks = sizes
        self.extra = ceil_div(rank, 8) * 8
        self._empty = functools.partial(torch.empty, dtype=dtype, device=table.device)
        tiles, constants = ceil_div(self.ins, 256), unpacking(self.ins, 0)
        kind = {"DTYPE": getattr(tl, str(dtype).removeprefix("torch.")), "ENTRIES": ENTRIES}
        constants |= {
            **kind, "WORD": tl.int16 if self.ins < 2**16 else tl.int32, "PER_BLOCK": per_block, "PAIRS": pairs,
            "EXTRA": 0 if not rank else max(16, 1 << (self.extra - 1).bit_length()),
        }  # fmt: skip
        ends, target = Varying(0, table.new_empty((1,), dtype=torch.int32)), Varying(1, self._empty(1))
        given = table, ends, target, self.outs, self.ins, self.ins + self.extra, blocks, tiles
        programs = tiles * ceil_div(self.outs, constants["BAND"])
        self._unpack = TritonLaunch(_unpack, (programs, self.experts), given, constants)
        self._factors = None
        if rank:
            kind |= {"WIDTH": min(_WIDTH, 1 << (self.ins - 1).bit_length())}
            given = table, ends, target, self.ins, self.extra
            self._factors = TritonLaunch(_collect_factors, (self.extra, self.experts), given, kind)

    def weights(self, ends: torch.Tensor) -> torch.Tensor:
        """[S, B]: (experts, out, in + extra). `ends`: int32, the first row after each expert's."""
        dense = self._empty((self.experts, self.outs, self.ins + self.extra))
        self._unpack(ends, dense)
        return dense

    def factors(self, ends: torch.Tensor) -> torch.Tensor:
        """A: (experts, extra, in)."""
        A = self._empty((self.experts, self.extra, self.ins))
        self._factors(ends, A)
        return A
