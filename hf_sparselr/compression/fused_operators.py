"""Operators of a block as fused kernels on a GPU: RMS norms."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F


@contextmanager
def fused_operators(block: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Inside, a block that works on CUDA takes fused kernels. Elsewhere, and in full FP32, it stays as it is."""
    if device.type != "cuda" or precision == "fp32":
        yield
        return
    norms = rms_norms(block)
    for norm, forward in norms.items():
        norm.forward = forward
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def rms_norms(block: nn.Module) -> dict[nn.Module, Callable]:
    """The forward passes to take instead of those of the modules that behave like RMS norms."""
    found = {}
    for module in block.modules():
        if (kind := _rms_norm(module)) is not None:
            found[module] = _fused(module, *kind)
    return found


def _fused(module: nn.Module, offset: float, eps: float) -> Callable:
    original = module.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype != torch.float32:
            return original(hidden)
        weight = module.weight + offset if offset else module.weight
        return F.rms_norm(hidden, weight.shape, weight, eps)

    return forward


@torch.no_grad()
def _rms_norm(module: nn.Module) -> tuple[float, float] | None:
    """(what is added to the weight, epsilon) of a module that behaves like an RMS norm."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].ndim != 1 or "forward" in vars(module):
        return None
    weight = parameters["weight"]
    rows = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0))
    rows = (rows * torch.tensor([[1.0], [1e-3]])).to(weight.device)  # epsilon shows in small rows only
    try:
        expected = module.forward(rows)
    except Exception:  # no norm
        return None
    for eps in {value for value in vars(module).values() if isinstance(value, float)}:
        for offset in (0.0, 1.0):
            if torch.allclose(F.rms_norm(rows, weight.shape, weight + offset, eps), expected, 1e-4, 1e-6):
                return offset, eps
    return None
