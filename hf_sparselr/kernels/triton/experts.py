"""S + B A of the experts that have rows, as one dense tensor, in one launch (Triton): for many rows of x."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..launch import TritonLaunch, Varying
from .unpack import unpack_band, unpacking

ENTRIES = 13  # of an expert in a table (see `cuda.experts`)


@triton.jit
def _densify_experts(
    table,
    ends,
    dense,
    outs,
    ins,
    blocks,
    tiles,
    DTYPE: tl.constexpr,
    WORD: tl.constexpr,
    ENTRIES: tl.constexpr,
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
    at = table + expert * ENTRIES
    if tl.load(ends + expert) > tl.load(ends + expert - 1, mask=expert > 0, other=0):
        words = tl.load(at).to(tl.pointer_type(tl.uint8))
        values = tl.load(at + 1).to(tl.pointer_type(DTYPE))
        starts = tl.load(at + 2).to(tl.pointer_type(tl.int32))
        offsets = tl.load(at + 3).to(tl.pointer_type(WORD))
        B = tl.multiple_of(tl.load(at + 4).to(tl.pointer_type(DTYPE)), 8)
        A = tl.multiple_of(tl.load(at + 12).to(tl.pointer_type(DTYPE)), 16)
        unpack_band(
            tl.program_id(0), words, values, starts, offsets, A, B, dense + expert.to(tl.int64) * outs * ins, outs, ins,
            blocks, tl.load(at + 8).to(tl.int32), tiles, WARPS, STEPS, BAND, RANK, PER_BLOCK, PAIRS, EVEN, LOW_RANK,
            ONE_STEP,
        )  # fmt: skip


def bind_densify_experts(
    table: torch.Tensor, experts: int, outs: int, ins: int, blocks: int, rank: int, per_block: int, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes S + B A of all experts with rows: `ends` to (experts, out, in). Those without rows hold anything.

    Args:
        table: int64 (experts, 13), as the kernels in CUDA C++ read it.
        rank: the largest.
        per_block: see `SupportIndex`; not for 2:4.
    """
    tiles, constants = -(-ins // 256), unpacking(ins, rank)
    ends, dense = Varying(0, table.new_empty((1,), dtype=torch.int32)), Varying(1, table.new_empty((1,), dtype=dtype))
    constants |= {
        "DTYPE": getattr(tl, str(dtype).removeprefix("torch.")), "WORD": tl.int16 if ins < 2**16 else tl.int32,
        "ENTRIES": ENTRIES, "PER_BLOCK": per_block, "PAIRS": False,
    }  # fmt: skip
    grid = tiles * -(-outs // constants["BAND"]), experts
    launch = TritonLaunch(_densify_experts, grid, (table, ends, dense, outs, ins, blocks, tiles), constants)
    device = table.device

    def densify(ends: torch.Tensor) -> torch.Tensor:
        dense = torch.empty((experts, outs, ins), dtype=dtype, device=device)
        launch(ends, dense)
        return dense

    return densify
