"""Between the products of experts: the order of rows, the gate, the sum over the experts of a token (Triton)."""

import functools

import torch
import triton
import triton.language as tl

from ..launch import TritonLaunch, Varying
from ..tensor_cache import apart
from .decode import ceil_div

MOST_PAIRS = 2048  # of tokens and experts that are all compared with each other; more are sorted
_PAIRS = 32  # of a program
_STEP = 64  # that a program compares with its own at a time
_WIDTH = 1024  # columns of a program


@triton.jit(do_not_specialize=["count"])
def _order(
    ids,
    tokens,
    places,
    ends,
    count,
    experts,
    top,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A stable counting sort: pairs (token, expert) in the order of their experts; PAIRS of them a program."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    mine = tl.load(ids + pair, mask=pair < count, other=experts).to(tl.int32)
    place = tl.zeros((PAIRS,), tl.int32)
    number = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    end = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, count, STEP):
        other_pair = first + tl.arange(0, STEP)
        other = tl.load(ids + other_pair, mask=other_pair < count, other=experts + 1).to(tl.int32)
        smaller = other[None, :] < mine[:, None]
        earlier = (other[None, :] == mine[:, None]) & (other_pair[None, :] < pair[:, None])
        place += tl.sum((smaller | earlier).to(tl.int32), 1)
        end += tl.sum((other[None, :] <= number[:, None]).to(tl.int32), 1)
    tl.store(tokens + place, (pair // top).to(tl.int64), mask=pair < count)
    tl.store(places + pair, place, mask=pair < count)
    tl.store(ends + number, end, mask=number < experts)


def order_pairs(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Brings the pairs of tokens and experts into the order of the experts, without waiting for the device.

    Args:
        index: int64 (tokens, k), the experts of each token, contiguous.

    Returns:
        The token of each row, int64 (tokens * k,), the row of each pair, int32 (tokens * k,), and the first row after
        each expert's, int32 (experts,).
    """
    count, top, device = index.numel(), index.shape[1], index.device
    if count > MOST_PAIRS:
        ordered, order = torch.sort(index.flatten().to(torch.int16))  # few bits: few passes
        ends = torch.searchsorted(ordered, _numbers(experts, torch.int16, device), right=True, out_int32=True)
        places = torch.empty(count, dtype=torch.int32, device=device)
        places.scatter_(0, order, torch.arange(count, dtype=torch.int32, device=device))
        return order // top, places, ends
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    places, ends = torch.empty(count + experts, dtype=torch.int32, device=device).split((count, experts))
    programs = ceil_div(count, _PAIRS)
    launch = _bind_order(programs, experts, top, device)
    launch(index, tokens, places, ends, count, grid=(programs, 1, 1))
    return tokens, places, ends


@functools.cache
def _numbers(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return apart(lambda: torch.arange(count, dtype=dtype, device=device), device)


@functools.cache
def _bind_order(programs: int, experts: int, top: int, device: torch.device) -> TritonLaunch:
    long, short = (torch.empty(4, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
    given = Varying(0, long), Varying(1, long), Varying(2, short), Varying(3, short[1:]), Varying(4, 3)
    width = max(16, 1 << (ceil_div(experts, programs) - 1).bit_length())
    constants = {"PAIRS": _PAIRS, "STEP": _STEP, "WIDTH": width, "num_warps": 4}
    return TritonLaunch(_order, (1, 1), (*given, experts, top), constants)


@triton.jit
def _gather(x, tokens, y, width, pitch, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    entry = tl.load(x + tl.load(tokens + row) * width + column, mask=column < width, other=0)
    tl.store(y + row * pitch + column, entry, mask=column < width)


def gather(x: torch.Tensor, tokens: torch.Tensor, room: int) -> torch.Tensor:
    """The rows of x (tokens, n), contiguous, of these tokens: (rows, n + room), with anything at the end."""
    rows, width = len(tokens), x.shape[1]
    y = x.new_empty(rows, width + room)
    _bind_gather(width, width + room, x.dtype, x.device)(x, tokens, y, grid=(rows, ceil_div(width, _WIDTH), 1))
    return y


@functools.cache
def _bind_gather(width: int, pitch: int, dtype: torch.dtype, device: torch.device) -> TritonLaunch:
    like = torch.empty(1, dtype=dtype, device=device)
    tokens = Varying(1, torch.empty(1, dtype=torch.int64, device=device))
    constants = {"WIDTH": min(_WIDTH, 1 << (width - 1).bit_length()), "num_warps": 4}
    return TritonLaunch(_gather, (1, 1), (Varying(0, like), tokens, Varying(2, like), width, pitch), constants)


@triton.jit
def _gate(x, y, width, pitch, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    gate = tl.load(x + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * pitch + column, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_gate(x: torch.Tensor, room: int = 0) -> torch.Tensor:
    """silu(gate) * up, in FP32 inside, of rows [gate, up]: (rows, 2 n), contiguous, to (rows, n + room)."""
    rows, width = len(x), x.shape[1] // 2
    y = x.new_empty(rows, width + room)
    _bind_gate(width, width + room, x.dtype, x.device)(x, y, grid=(rows, ceil_div(width, _WIDTH), 1))
    return y


@functools.cache
def _bind_gate(width: int, pitch: int, dtype: torch.dtype, device: torch.device) -> TritonLaunch:
    like = torch.empty(1, dtype=dtype, device=device)
    constants = {"WIDTH": min(_WIDTH, 1 << (width - 1).bit_length()), "num_warps": 4}
    return TritonLaunch(_gate, (1, 1), (Varying(0, like), Varying(1, like), width, pitch), constants)


@triton.jit
def _combine(x, places, weights, y, width, TOP: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros((WIDTH,), tl.float32)
    for k in tl.static_range(TOP):
        row = tl.load(places + token * TOP + k).to(tl.int64)
        weight = tl.load(weights + token * TOP + k).to(tl.float32)
        total += weight * tl.load(x + row * width + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + token * width + column, total, mask=inside)


def combine(x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of every token's rows, in FP32 inside.

    Args:
        x: (tokens * k, n), contiguous.
        places: int32 (tokens * k,), the row of each pair.
        weights: (tokens, k), contiguous.

    Returns:
        (tokens, n), in the dtype of x.
    """
    (tokens, top), width = weights.shape, x.shape[1]
    y = x.new_empty(tokens, width)
    launch = _bind_combine(top, width, x.dtype, weights.dtype, x.device)
    launch(x, places, weights, y, grid=(tokens, ceil_div(width, _WIDTH), 1))
    return y


@functools.cache
def _bind_combine(
    top: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> TritonLaunch:
    like, number = torch.empty(1, dtype=dtype, device=device), torch.empty(1, dtype=torch.int32, device=device)
    given = Varying(0, like), Varying(1, number), Varying(2, like.to(weight_dtype)), Varying(3, like)
    constants = {"TOP": top, "WIDTH": min(_WIDTH, 1 << (width - 1).bit_length()), "num_warps": 4}
    return TritonLaunch(_combine, (1, 1), (*given, width), constants)
