"""Kernels that give the same bits each time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


@contextmanager
def deterministic_kernels(warn_only: bool = False) -> Iterator[None]:
    """Inside, kernels with sums in a changing order give way to others; new tensors are not filled, which costs a pass.

    Not by `torch.use_deterministic_algorithms`, which imports the compiler.

    Args:
        warn_only: operators without such a kernel warn and run, rather than raise.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    torch._C._set_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(enabled, warn_only=before)
        deterministic.fill_uninitialized_memory = filling
