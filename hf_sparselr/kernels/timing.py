"""How long a call keeps the GPU, and the host, busy."""

import functools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from .tensor_cache import apart

_BUSY = threading.Lock()  # one measurement at a time: on one stream, as cuBLAS keeps a workspace for each


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median time of a call on a CUDA device, whose weights come from memory, as they do in a model.

    The call is captured as a CUDA graph and replayed: the time is that of the device, not of the host's launches.
    Before each replay the L2 cache is filled by reading: lines written would have to go to memory in the time
    measured.

    Raises:
        RuntimeError: within the capture of a CUDA graph.
    """
    with _BUSY:
        return apart(lambda: _milliseconds(run, device, repeats), device, _stream(device))


def host_milliseconds(run: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median time in which the host issues an eager call, however busy the GPU is."""
    run()
    torch.cuda.synchronize(device)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    torch.cuda.synchronize(device)
    return statistics.median(times)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _milliseconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    run()  # compiles, and makes what is kept
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        run()
    finally:
        graph.capture_end()
    size = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.zeros(size // 2, device=device)  # FP32: twice the cache
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(2):
            flush.sum()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
