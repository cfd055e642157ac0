"""Kernels are compiled in the background while a model's weights are read, so that its first call finds them ready.

A machine that has them on disk has little left to do. Kernels are bound to stand-ins of random support, as their source
depends on the shapes and the kind of support of a weight, and seldom on more.
"""

import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..format.bitmask import pack_mask
from ..format.patterns import Pattern, Unstructured
from ..utils.availability import TRITON
from . import cpu, fast_calls
from .packed_weight import PackedWeight

logger = logging.getLogger(__name__)

PROMPT, LONG_PROMPT = 128, 512  # rows of x: longer and shorter prompts mostly have the same kernels
_WORKERS = 3
_BAND = 1024  # rows of a stand-in that are drawn at a time
_DTYPES = (torch.bfloat16, torch.float16)


class Kind(NamedTuple):
    """What the kernels of a weight (outs, ins) depend on."""

    outs: int
    ins: int
    pattern: Pattern
    rank: int
    bias: bool
    dtype: torch.dtype


def compile_ahead(groups: Iterable[Sequence[Kind]], device: torch.device) -> list[threading.Thread]:
    """Starts to compile what a model's first prompts and tokens need. What fails there is left to the first call.

    Args:
        groups: of all weights; those of a group have inputs of one width.
        device: to which the weights go, of CUDA or the CPU. Nothing is done for others, or where memory is scarce.

    Returns:
        The threads, to join before a CUDA graph is captured.
    """
    groups = [tuple(group) for group in groups]
    if device.type == "cpu":
        dtypes = {kind.dtype for group in groups for kind in group}
        return _started([functools.partial(cpu.supports, dtype) for dtype in dtypes] + [fast_calls.compiled])
    groups = [group for group in groups if all(kind.dtype in _DTYPES for kind in group)]
    if device.type != "cuda" or not TRITON or not groups:
        return []
    needed = sum(2 * kind.pattern.kept((kind.outs, kind.ins)) for group in groups for kind in group)
    if torch.cuda.mem_get_info(device)[0] < 2 * needed:
        return []
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    for task in dict.fromkeys(_tasks(groups)):
        tasks.put(task)
    return _started([functools.partial(_work, tasks, device)] * _WORKERS + [fast_calls.compiled])


def _started(works: Sequence[Callable[[], object]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def _tasks(groups: Sequence[tuple[Kind, ...]]) -> Iterator[tuple[int, tuple[Kind, ...]]]:
    """Rows of x and the weights of a launch: in a first prompt each weight is alone, then most of a group share it."""
    yield from ((PROMPT, (kind,)) for group in groups for kind in group)
    for fewer in (0, 1):
        yield from ((1, group[: len(group) - fewer]) for group in groups if len(group) > fewer)
    yield from ((1, group[-1:]) for group in groups)
    yield from ((LONG_PROMPT, (kind,)) for group in groups for kind in group)


def _work(tasks: queue.SimpleQueue, device: torch.device) -> None:
    from . import gpu

    while threading.main_thread().is_alive():
        try:
            rows, kinds = tasks.get_nowait()
        except queue.Empty:
            return
        try:
            with torch.no_grad(), torch.cuda.device(device):
                made = {kind: stand_in(kind, device) for kind in set(kinds)}
                weights = [made[kind] for kind in kinds]
                gpu.bind(weights[0].values, rows, weights, "auto", measures=False)
        except Exception as error:  # of any kind: the call that needs it says it, too
            logger.info("kernels for %d rows were not compiled ahead: %r", rows, error)


def stand_in(kind: Kind, device: torch.device) -> PackedWeight:
    """A weight of a kind. Its values are whatever memory holds."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=kind.dtype, device=device)

    masks, kept = [], 0
    for top in range(0, kind.outs, _BAND):
        support = _support(min(_BAND, kind.outs - top), kind, device)
        masks.append(pack_mask(support))
        kept += int(support.sum())
    A, B = (empty(kind.rank, kind.ins), empty(kind.outs, kind.rank)) if kind.rank else (None, None)
    bias = empty(kind.outs) if kind.bias else None
    return PackedWeight(torch.cat(masks), empty(kept), A, B, bias, kind.ins)


def _support(rows: int, kind: Kind, device: torch.device) -> torch.Tensor:
    """Some rows of one: bool (rows, ins)."""
    scores = torch.rand(rows, kind.ins, device=device)
    if isinstance(kind.pattern, Unstructured):
        return scores < kind.pattern.kept((kind.outs, kind.ins)) / (kind.outs * kind.ins)
    return kind.pattern.mask(scores)
