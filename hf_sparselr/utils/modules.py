"""Walks over modules and their tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; after it every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def move_to_device(values: Any, device: torch.device) -> Any:
    """Nested containers with every tensor in them on a device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, values)


def named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's parameters and buffers."""
    return [*module.named_parameters(), *module.named_buffers()]
