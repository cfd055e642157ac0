# ruff: noqa: RUF005 (Triton compiles tuples, but not unpacking)
"""The step of `admm` that finds an N:M support as one Triton kernel: one pass over memory.

torch.compile makes several kernels of the same step.
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
_ENTRIES = 16  # per thread: the largest M, and enough loads in flight to keep the memory busy


@triton.jit
def _move(T, mask, W, E, size, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
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
        tl.store(T + place + k, moved[k // 4], mask=place + k < size)
        tl.store(mask + place + k, stack(kept[k : k + 4]), mask=place + k < size)


@triton.jit
def _columns(tile):
    """The four columns of a tile (rows, 4), the inverse of `stack`."""
    even, odd = tl.split(tile.reshape(tile.shape[0], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


def supports(pattern: NM | None) -> bool:
    """Whether `move` runs here; the first call may compile."""
    return pattern is not None and pattern.m in (2, 4, 8, 16) and _compiles()


def move(T: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, E: torch.Tensor, pattern: NM) -> None:
    """`admm._sparse` under N:M, to the bit.

    Args:
        T, W, E: (out, in) FP32, contiguous, `in` divisible by M.
        mask: bool, same shape, contiguous.
    """
    block = 32 * _WARPS * _ENTRIES
    with torch.cuda.device_of(T):  # Triton launches on the current device
        _move[(triton.cdiv(T.numel(), block),)](
            T, mask.view(torch.uint8), W, E, T.numel(),
            N=pattern.n, M=pattern.m, BLOCK=block, num_warps=_WARPS,
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
