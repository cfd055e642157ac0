# ruff: noqa: RUF005 (Triton compiles tuples, but not unpacking)
"""Elementwise steps of `admm` as Triton kernels, each one pass over memory.

torch.compile makes several kernels of the steps under N:M, and takes seconds for it.
"""

import functools
import logging

import torch
import triton
import triton.language as tl

from ...format.patterns import NM
from ...kernels.triton.support import stack

logger = logging.getLogger(__name__)

_WARPS = 4
_BLOCK = 1024
LARGEST_BLOCK = 64  # of `inverse_factors`, held in registers
_ENTRIES = 16  # per thread: the largest M, and enough loads in flight to keep the memory busy


@triton.jit
def _move(T, mask, W, E, L, rho, Z, size, N: tl.constexpr, M: tl.constexpr, CORRECT: tl.constexpr, BLOCK: tl.constexpr):
    WIDTH: tl.constexpr = max(M, 4)  # neighbours per thread: whole groups, so that threads share none
    lane, four = tl.arange(0, BLOCK // WIDTH)[:, None], tl.arange(0, 4)[None, :]
    place = tl.program_id(0).to(tl.int64) * BLOCK + (lane * WIDTH + four)
    moved, sizes, kept = (), (), ()
    for k in tl.static_range(0, WIDTH, 4):  # vectors of four; all are read before the first is written
        at, inside = place + k, place + k < size
        entry = tl.where(tl.load(mask + at, mask=inside) != 0, 0.0, tl.load(T + at, mask=inside))
        entry += tl.load(W + at, mask=inside)
        moved = moved + (entry - tl.load(E + at, mask=inside),)
        sizes = sizes + _columns(tl.abs(moved[k // 4]))
    for j in tl.static_range(WIDTH):
        rank = tl.zeros_like(sizes[j]).to(tl.int32)
        for i in tl.static_range(j // M * M, j // M * M + M):
            if i < j:  # ties go to the lower index; NaN as in `NM.mask`
                rank += (sizes[i] >= sizes[j]).to(tl.int32)
            elif i > j:
                rank += 1 - (sizes[j] >= sizes[i]).to(tl.int32)
        kept = kept + ((rank < N).to(tl.uint8),)
    for k in tl.static_range(0, WIDTH, 4):
        support = stack(kept[k : k + 4])
        tl.store(T + place + k, moved[k // 4], mask=place + k < size)
        tl.store(mask + place + k, support, mask=place + k < size)
        if CORRECT:
            entry = tl.where(support != 0, moved[k // 4], -1.0 * moved[k // 4])  # 0 - x would make 0 of 0
            entry -= tl.load(W + place + k, mask=place + k < size)
            entry += tl.load(L + place + k, mask=place + k < size)
            tl.store(Z + place + k, entry * tl.load(rho), mask=place + k < size)


@triton.jit
def _shift(T, mask, W, E, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    entry = tl.where(tl.load(mask + at, mask=inside) != 0, 0.0, tl.load(T + at, mask=inside))
    entry += tl.load(W + at, mask=inside)
    tl.store(T + at, entry - tl.load(E + at, mask=inside), mask=inside)


@triton.jit
def _correct(T, mask, W, L, rho, Z, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    entry = tl.load(T + at, mask=inside)
    entry = tl.where(tl.load(mask + at, mask=inside) != 0, entry, -1.0 * entry)
    entry -= tl.load(W + at, mask=inside)
    entry += tl.load(L + at, mask=inside)
    tl.store(Z + at, entry * tl.load(rho), mask=inside)


@triton.jit
def _stiffen(T, mask, factor, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    entry = tl.load(T + at, mask=inside)
    tl.store(T + at, tl.div_rn(entry, factor), mask=inside & (tl.load(mask + at, mask=inside, other=1) == 0))


@triton.jit
def _invert(C, F, width, rounding, R: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(1).to(tl.int64) * width * width + tl.program_id(0) * R * (width + 1)
    one = tl.arange(0, SIZE)
    row, column = one[:, None], one[None, :]
    at, inside = first + row * width + column, (row < R) & (column < R)
    tile = tl.load(C + at, mask=inside, other=0.0)
    squares = tl.sum(tl.where(row == column, tile, 0.0), axis=1)
    others = tl.sum(tl.where(row == column, tile, 0.0), axis=0)
    unit = tl.where(squares < 1.1754944e-38, 0.0, tl.rsqrt(squares))
    units = tl.where(others < 1.1754944e-38, 0.0, tl.rsqrt(others))
    tile = tile * unit[:, None] * units[None, :]
    tile += tl.where(row == column, tl.where(row < R, rounding, 1.0), 0.0)
    factor = tl.where(row == column, 1.0, 0.0)
    for j in range(R):  # elimination: the tile becomes upper triangular, the factor its inverse
        pivots = tl.sum(tl.where(row == j, tile, 0.0), axis=0)
        own = tl.sum(tl.where(row == j, factor, 0.0), axis=0)
        below = tl.sum(tl.where(column == j, tile, 0.0), axis=1)
        pivot = tl.maximum(tl.sum(tl.where(one == j, pivots, 0.0), axis=0), rounding / 10)
        share = tl.where(one > j, below / pivot, 0.0)
        tile -= share[:, None] * pivots[None, :]
        factor -= share[:, None] * own[None, :]
    root = tl.rsqrt(tl.maximum(tl.sum(tl.where(row == column, tile, 0.0), axis=1), rounding / 10))
    tl.store(F + at, factor * root[:, None] * units[None, :], mask=inside)


@triton.jit
def _columns(tile):
    """The four columns of a tile (rows, 4), the inverse of `stack`."""
    even, odd = tl.split(tile.reshape(tile.shape[0], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


def supports(pattern: NM | None) -> bool:
    """Whether `move` runs here; the first call may compile."""
    return (pattern is None or pattern.m in (2, 4, 8, 16)) and _compiles()


def move(T: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, E: torch.Tensor, pattern: NM | None) -> None:
    """`admm._sparse`, to the bit.

    Args:
        T, W, E: (out, in) FP32, contiguous, `in` divisible by M.
        mask: bool, same shape, contiguous.
    """
    if pattern is not None:
        _launch(T, mask, W, E, None, None, None, pattern)
        return
    with torch.cuda.device_of(T):
        _shift[(triton.cdiv(T.numel(), _BLOCK),)](T, mask.view(torch.uint8), W, E, T.numel(), BLOCK=_BLOCK)


def correction(
    T: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, L: torch.Tensor, rho: torch.Tensor, Z: torch.Tensor
) -> None:
    """Writes `admm._correction` into Z, to the bit; arguments as in `move_and_correct`."""
    with torch.cuda.device_of(T):
        _correct[(triton.cdiv(T.numel(), _BLOCK),)](T, mask.view(torch.uint8), W, L, rho, Z, T.numel(), BLOCK=_BLOCK)


def stiffen(T: torch.Tensor, mask: torch.Tensor, factor: float) -> None:
    """Divides T by the factor outside of the mask: the dual does not change while the penalty grows.

    Args:
        T: (out, in) FP32, contiguous.
        mask: bool, same shape, contiguous.
    """
    with torch.cuda.device_of(T):
        _stiffen[(triton.cdiv(T.numel(), _BLOCK),)](T, mask.view(torch.uint8), factor, T.numel(), BLOCK=_BLOCK)


def move_and_correct(
    T: torch.Tensor,
    mask: torch.Tensor,
    W: torch.Tensor,
    E: torch.Tensor,
    L: torch.Tensor,
    rho: torch.Tensor,
    Z: torch.Tensor,
    pattern: NM,
) -> None:
    """`move`, and then `admm._correction` into Z, to the bit.

    Args:
        L: (out, in) FP32, contiguous.
        rho: () FP32, on the device.
        Z: (out, in), contiguous; BF16 or FP32.
    """
    _launch(T, mask, W, E, L, rho, Z, pattern)


def inverse_factors(C: torch.Tensor, count: int) -> torch.Tensor:
    """`base.inverse_factors` of the diagonal blocks of matrices, zero beside them, in one kernel.

    Args:
        C: (batch, count * r, count * r) FP32, contiguous, r at most `LARGEST_BLOCK`.
        count: of the blocks of each matrix.
    """
    batch, width, _ = C.shape
    rank = width // count
    size = max(16, triton.next_power_of_2(rank))
    rounding = 10 * torch.finfo(C.dtype).eps * rank
    factors = torch.empty_like(C) if count == 1 else torch.zeros_like(C)
    with torch.cuda.device_of(C):
        _invert[(count, batch)](C, factors, width, rounding, R=rank, SIZE=size, num_warps=1 if size <= 16 else 4)
    return factors


def _launch(T, mask, W, E, L, rho, Z, pattern: NM) -> None:
    block = 32 * _WARPS * _ENTRIES
    with torch.cuda.device_of(T):  # Triton launches on the current device
        _move[(triton.cdiv(T.numel(), block),)](
            T, mask.view(torch.uint8), W, E, L, rho, Z, T.numel(),
            N=pattern.n, M=pattern.m, CORRECT=Z is not None, BLOCK=block, num_warps=_WARPS,
        )  # fmt: skip


@functools.cache
def _compiles() -> bool:
    """Whether Triton runs. It needs a C compiler; without one `admm` takes torch.compile's kernels."""
    T = torch.zeros(1, 4, device="cuda")
    try:
        move(T, T.bool(), T, T, NM(2, 4))
    except Exception as error:  # many types: a missing compiler, an old GPU
        logger.warning("N:M layers are solved on the GPU without the step in Triton, slower (%s)", error)
        return False
    return True
