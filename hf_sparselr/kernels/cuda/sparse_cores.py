"""x S^T + (x A^T) B^T + bias by the sparse tensor cores, for 2:4 and many rows of x (cuSPARSELt).

S is in their layout for the length of one call. cuSPARSELt keeps the values in the order of the packed form. Two bits a
value follow, which say in which of four columns it is. So the values are copied and the mask is translated
(`torch._cslt_compress`, from a dense matrix, takes 1.85 ms for 14336 x 4096 on an H100).

The order of those bits is not documented. It was found by compressing matrices whose groups keep other columns where a
bit of the group's number is set, and is compared with what torch makes, bit for bit, before a device is used: tiles of
64 rows x 32 columns, row by row of tiles, 32 words of 64 bits each. A word belongs to rows r and r + 8; its bytes to
groups 0, 4, 1, 5, 2, 6, 3, 7 of four columns, row r in the low half of each. Words are in the order of r: 0 to 7, 16 to
23, 32 to 39, 48 to 55.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ...format.bitmask import pack_mask
from ..launch import TritonLaunch, Varying
from ..launch_config import JOINED, LaunchConfig
from ..packed_weight import PackedWeight
from ..program import ROWS, Launch, Memory, Multiply, Part, PerRows, Program, Step, X, y
from ..support_index import index_of
from ..timing import milliseconds
from ..triton.decode import can_pair, ceil_div
from ..triton.unpack_then_gemm import bind_unpacked
from .cusparselt import CuSparseLtError, SparsePlan, plan_for
from .low_rank import factor_step

_ROWS, _COLUMNS = 64, 32  # of S in a tile of places
_CHUNK = 512  # columns of a program
_PADDING = 16  # rows of x are rounded up to a multiple
_MOST_ALGORITHMS = 64


@triton.jit
def _arrange(words, values, B, out, outs, ins, width, rank, chunks, CHUNK: tl.constexpr, PAIRS: tl.constexpr):
    top, chunk = tl.program_id(0) * 64, tl.program_id(1)
    places = out + outs.to(tl.int64) * width
    if chunk < chunks:
        _take_over(words, values, out, ins, width, places, top, chunk, CHUNK)
    else:
        _join(B, out, ins, width, rank, places, top, PAIRS)


@triton.jit
def _take_over(words, values, out, ins, width, places, top, chunk, CHUNK: tl.constexpr):
    """Values and places of S."""
    row = top + tl.arange(0, 64)[:, None]
    four = chunk * (CHUNK // 8) + tl.arange(0, CHUNK // 8)[None, :]  # values
    value = tl.load(values.to(tl.pointer_type(tl.int64)) + row * (ins // 8) + four, mask=four < ins // 8)
    tl.store(out.to(tl.pointer_type(tl.int64)) + row * (width // 4) + four, value, mask=four < ins // 8)
    lane = tl.arange(0, CHUNK)
    tile, number = chunk * (CHUNK // 32) + lane // 32, lane % 32
    row_of_word = top + number % 8 + number // 8 * 16
    at = words.to(tl.pointer_type(tl.uint32)) + row_of_word * (ins // 32) + tile
    upper = _places(tl.load(at, mask=tile < ins // 32, other=0))
    lower = _places(tl.load(at + ins // 4, mask=tile < ins // 32, other=0))
    to = places.to(tl.pointer_type(tl.uint64)) + top * (width // 32) + tile * 32 + number
    tl.store(to, upper | (lower << 4), mask=tile < ins // 32)


@triton.jit
def _join(B, out, ins, width, rank, places, top, PAIRS: tl.constexpr):
    """Those of B behind them: its even pairs of columns as groups that keep columns 0, 1, its odd ones 2, 3."""
    row = top + tl.arange(0, 64)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    value = tl.load(B.to(tl.pointer_type(tl.int32)) + row * (rank // 2) + pair, mask=pair < rank // 2)
    at = row * (width // 2) + ins // 4 + pair % 2 * (rank // 4) + pair // 2
    tl.store(out.to(tl.pointer_type(tl.int32)) + at, value, mask=pair < rank // 2)
    word = tl.arange(0, 4 * PAIRS)  # 32 for each 32 columns
    code = tl.where(word < rank, 0x4444444444444444, -0x1111111111111112)
    to = places.to(tl.pointer_type(tl.int64)) + top * (width // 32) + ins + word
    tl.store(to, code, mask=word < 2 * rank)


@triton.jit
def _places(mask):
    """Of eight groups that keep two columns: four bits each, the first column and the second, spread for a word."""
    b0, b1 = mask & 0x11111111, (mask >> 1) & 0x11111111
    b2, b3 = (mask >> 2) & 0x11111111, (mask >> 3) & 0x11111111
    first = (b1 & ~b0) | ((0x11111111 & ~(b0 | b1)) << 1)
    second = (b3 | (0x11111111 & ~b2)) | ((b2 | b3) << 1)
    codes = (first | (second << 2)).to(tl.uint64)
    return _spread(codes & 0xFFFF) | (_spread(codes >> 16) << 8)


@triton.jit
def _spread(codes):
    """Four bits to the start of each sixteen."""
    codes = (codes | (codes << 24)) & 0x000000FF000000FF
    return (codes | (codes << 12)) & 0x000F000F000F000F


@triton.jit(do_not_specialize=["count"])
def _append(x, u, out, count, ins, width, rank, WIDTH: tl.constexpr):
    """x, or with a width of ins + 2 rank [x, u, u]: (count, width)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    left = tl.load(x + row * ins + column, mask=column < ins, other=0)
    right = tl.load(u + row * rank + (column - ins) % rank, mask=(column >= ins) & (column < width), other=0)
    tl.store(out + row * width + column, tl.where(column < ins, left, right), mask=column < width)


def bind_arrange(weight: PackedWeight, joined: bool) -> tuple[TritonLaunch, int]:
    """The launch that writes S, or S and B joined, (out, in + 2 rank), as cuSPARSELt keeps it: values, then places.

    Args:
        weight: contiguous, 2:4 of 16 bits, `out` and `in` multiples of 64; if joined, a rank that is a multiple of 32.

    Returns:
        A launch of one tensor, and the number of entries of 16 bits that it has.
    """
    mask, values, _, B, _, ins = weight
    index = index_of(mask, ins)
    outs, rank = weight.out_features, weight.rank if joined else 0
    width = ins // 2 + rank  # values of a row
    chunks, pairs = ceil_div(ins, _CHUNK), max(16, 1 << (rank // 2 - 1).bit_length() if rank else 0)
    arguments = (
        index.words(mask), values, B if joined else values, Varying(0, values.new_empty((64,))), outs, ins, width, rank,
        chunks,
    )  # fmt: skip
    constants = {"CHUNK": _CHUNK, "PAIRS": pairs, "num_warps": 8}
    return TritonLaunch(_arrange, (outs // _ROWS, chunks + joined), arguments, constants), outs * width * 9 // 8


def arrange(weight: PackedWeight, joined: bool) -> torch.Tensor:
    """What `bind_arrange` launches, (out, 9 / 16 of the columns)."""
    launch, size = bind_arrange(weight, joined)
    out = weight.values.new_empty(size)
    launch(out)
    return out.view(weight.out_features, -1)


@dataclass(frozen=True)
class SparseMultiply:
    """y = x S^T by a plan; S as `arrange` makes it. Takes slots."""

    plan: SparsePlan
    S: int
    x: int
    y: int
    workspace: int

    def run(self, slots: list[Any], weights: Sequence[PackedWeight]) -> None:
        self.plan(*(slots[slot].data_ptr() for slot in (self.S, self.x, self.y, self.workspace)))

    def moved(self, slot: Callable[[int], int], weight: Callable[[int], int]) -> "SparseMultiply":
        return SparseMultiply(self.plan, *map(slot, (self.S, self.x, self.y, self.workspace)))

    def words(self, weights: Sequence[PackedWeight]) -> list[int]:
        plan = self.plan
        return [2, plan.function, plan.handle, plan.plan, self.S, self.x, self.y, self.workspace]


def bind_sparse(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """The product of one weight on the sparse tensor cores, if cuSPARSELt takes these rows as those that were tried."""
    (weight,) = weights
    outs, ins, rank, dtype = weight.out_features, weight.in_features, weight.rank, weight.values.dtype
    if not _fits(weight):  # the choice was made for another weight of these sizes
        return bind_unpacked(rows, weights, JOINED)
    padded, joined = -(-rows // _PADDING) * _PADDING, config.joined and _joins(weight)
    width = ins + 2 * rank * joined
    bias = 0 if weight.bias is None else weight.bias.data_ptr()
    try:
        plan = plan_for(weight.values.get_device(), outs, width, padded, config.algorithm, bias)
    except CuSparseLtError:
        return bind_unpacked(rows, weights, JOINED)
    launch, size = bind_arrange(weight, joined)
    sparse, workspace, factor, inputs = 3, 4, 5, 6
    memories = [
        Memory(dtype, size), Memory(torch.uint8, max(plan.workspace, 1)), Memory(dtype, per_row=rank),
        Memory(dtype, padded * width),
    ]  # fmt: skip
    steps: list[Step] = [Launch(launch, (sparse,))]
    if rank:
        steps.append(factor_step(rows, weight, factor))
    if joined or padded != rows:
        given = (Varying(n, weight.values.new_empty((64,))) for n in range(3))
        arguments = *given, Varying(3, rows), ins, width, max(1, rank)
        columns = ceil_div(width, _CHUNK)
        append = TritonLaunch(_append, (rows, columns), arguments, {"WIDTH": _CHUNK})
        steps.append(Launch(append, (X, factor, inputs, ROWS), (PerRows(1, 1), columns, 1)))
    else:
        inputs = X
        memories.pop()
    steps.append(SparseMultiply(plan, sparse, inputs, y(0), workspace))
    if rank and not joined:
        steps.append(Multiply(y(0), factor, Part(0, "B"), outs, rank, adds=True))
    return Program((outs,), tuple(memories), tuple(steps), rows=rows, padding=_PADDING)


def _fits(weight: PackedWeight) -> bool:
    """Whether a weight can be arranged: sizes, and addresses from which words can be read.

    Not in FP16: there cuSPARSELt 0.8's own search for an algorithm ends with an illegal instruction on an H100.
    """
    whole = not (weight.out_features % _ROWS or weight.in_features % (2 * _COLUMNS))
    return (
        whole
        and weight.values.dtype == torch.bfloat16
        and can_pair(index_of(weight.mask, weight.in_features), weight.values)
    )


def _joins(weight: PackedWeight) -> bool:
    """Whether B can be columns of S."""
    return weight.rank > 0 and weight.rank % 32 == 0 and weight.B.data_ptr() % 4 == 0


def sparse_configs(inputs: torch.Tensor, weight: PackedWeight) -> tuple[LaunchConfig, ...]:
    """The configurations to try for a 2:4 layer, with the algorithm of cuSPARSELt that is the fastest here."""
    if not _fits(weight):
        return ()
    times = _times(inputs.reshape(-1, weight.in_features), weight)
    ways = (True, False) if _joins(weight) else (False,)
    best = times.index(min(times)) if times else 0
    return tuple(LaunchConfig("sparse_cores", joined=way, algorithm=best) for way in ways if times)


def _times(x: torch.Tensor, weight: PackedWeight) -> list[float]:
    """Of the product by each of cuSPARSELt's algorithms, which are tried until one is refused."""
    S, rows, outs = arrange(weight, joined=False), -(-len(x) // _PADDING) * _PADDING, weight.out_features
    x, y = F.pad(x, (0, 0, 0, rows - len(x))), x.new_empty(rows, outs)
    times = []
    with contextlib.suppress(CuSparseLtError):
        for algorithm in range(_MOST_ALGORITHMS):
            plan = SparsePlan(x.get_device(), outs, x.shape[1], rows, algorithm)
            memory = torch.empty(max(plan.workspace, 1), dtype=torch.uint8, device=x.device)
            run = functools.partial(plan, S.data_ptr(), x.data_ptr(), y.data_ptr(), memory.data_ptr())
            times.append(milliseconds(run, x.device, 5))
    return times


_CHECKED: dict[torch.device, bool] = {}


def has_sparse_cores(device: torch.device, capturing: bool) -> bool:
    """Whether there is cuSPARSELt for a device, with the layout of `arrange`. Not found out during a capture."""
    if device not in _CHECKED and not capturing:
        _CHECKED[device] = device.type == "cuda" and _has_layout(device)
    return _CHECKED.get(device, False)


def _has_layout(device: torch.device) -> bool:
    outs, ins, generator = 128, 192, torch.Generator(device).manual_seed(0)
    scores = torch.rand(outs, ins // 4, 4, device=device, generator=generator)
    kept = (scores.argsort(-1).argsort(-1) < 2).view(outs, ins)
    dense = (1 + torch.rand(outs, ins, device=device, generator=generator)).bfloat16() * kept
    weight = PackedWeight(pack_mask(kept), dense[kept], None, None, None, ins)
    try:
        expected = torch._cslt_compress(dense)
        SparsePlan(weight.values.get_device(), outs, ins, 64, 0)
    except (AttributeError, RuntimeError, OSError):  # not there, or not for such a device
        return False
    return torch.equal(expected.flatten(), arrange(weight, joined=False).flatten())
