"""Several processes compress one model: who gets which batches, and how they start together.

A launcher (torchrun, accelerate launch) starts them, one a GPU, or a few on CPUs. Each one has the whole dense model in
main memory, and a share of the calibration batches. Gram matrices, gradients of transformer matching and losses are
summed over all of them. The solves are shared, see `layer_solving`. All end with the same packed model.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from transformers.utils import logging as transformers_logging

from ..data.model_inputs import Sample
from ..utils.world import ALONE, World

TIMEOUT = timedelta(hours=1)  # of one wait for the others, such as for the file that the first one writes

logger = logging.getLogger("hf_sparselr")


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: Any = None) -> Iterator[World]:
    """Inside, the processes of a launcher work together, each on the GPU of its local rank, or on the CPU.

    Only the first one shows progress and logs. A process group that is initialised is used as it is.

    Args:
        device: that the user asked for: None, "cuda" or "cpu".

    Raises:
        ValueError: one certain device for all of them, or more processes than GPUs on this machine.
    """
    if not launched() and not distributed.is_initialized():
        yield ALONE
        return
    ours = not distributed.is_initialized()
    _take_device(device)
    if ours:
        on_cuda = _on_cuda(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    world = World.of_default_group()
    with _quiet(not world.first):
        yield world
    if ours:  # not after an error: that would wait for the others
        distributed.destroy_process_group()


def _on_cuda(device: Any) -> bool:
    return torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda")


def _take_device(device: Any) -> None:
    if device is not None and torch.device(device).index is not None:
        raise ValueError(
            f"device={device!r}: each of several processes takes its own GPU; leave it out, or pass 'cuda' or 'cpu'"
        )
    if not _on_cuda(device):
        return
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"the launcher started more processes than this machine has GPUs ({count})")
    torch.cuda.set_device(local)


def check_placement(model: nn.Module, world: World) -> None:
    """Checks that a model in memory can be compressed by several processes.

    Raises:
        ValueError: a part of it is on a GPU that is not this process's own.
    """
    if world.size == 1:
        return
    places = {parameter.device for parameter in model.parameters()}
    foreign = [place for place in places if place.type == "cuda" and place.index != torch.cuda.current_device()]
    if foreign:
        raise ValueError(
            f"the model is on {', '.join(sorted(map(str, places)))}: with distributed=True each needs it on the CPU, "
            "or whole on its own GPU; a model that is spread over GPUs is compressed by one process"
        )


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Inside, no progress bars and only errors in the log, if wanted."""
    if not wanted:
        yield
        return
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def spread(batches: list[Sample], kept_back: int, world: World) -> tuple[list[Sample], int]:
    """The batches of this process, in turns with the others, and how many of them, at the end, are kept back.

    Args:
        batches: of all processes.
        kept_back: so many at the end are kept back from refinement.
    """
    trained = world.share(batches[: len(batches) - kept_back])
    judged = world.share(batches[len(batches) - kept_back :])
    return trained + judged, len(judged)


def even_batch(size: int, step: int, world: World) -> int:
    """Samples at a time: the divisor of `size` with which a step of `step` samples is spread most evenly.

    Args:
        size: the most samples at a time; divides `step`.
    """
    divisors = [each for each in range(size, 0, -1) if size % each == 0]
    return min(divisors, key=lambda each: -(-(step // each) // world.size) * each)
