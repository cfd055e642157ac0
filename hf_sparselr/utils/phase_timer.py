"""Where time and memory go, phase by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Sums the seconds of named phases, and on CUDA their highest memory in bytes.

    Args:
        device: CUDA works asynchronously, so the clock is read with the device idle.
        memory: whether to measure memory. Of nested phases only the outer ones can.
    """

    def __init__(self, device: torch.device, memory: bool = True) -> None:
        self.device = device
        self._memory = memory and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        if self._memory:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started
        if self._memory:
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))

    def add(self, seconds: dict[str, float]) -> None:
        """Adds phases that a solver measured itself: {name: seconds}."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
