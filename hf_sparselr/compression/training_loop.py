"""What transformer matching and distillation have in common: optimiser, steps, snapshots."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..config.options import TMOptions
from ..utils.precision import LARGE, arithmetic
from .capture import replay

Call = tuple[tuple, dict]


# The paper names no betas. With Adam's usual 0.999 the large first gradients would damp all of the few hundred steps.
BETAS = (0.9, 0.9)


def resolve_precision(options: TMOptions, block: nn.Module) -> TMOptions:
    """`options` with what "auto" means for a block."""
    if options.precision != "auto":
        return options
    return replace(options, precision="bf16" if large(block.parameters()) else "tf32")


def large(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the work on them is bound by its arithmetic, not by launching it."""
    return any(parameter.numel() > LARGE for parameter in parameters)


@torch.no_grad()
def mean_squared_error(
    block: nn.Module,
    inputs: list[torch.Tensor],
    targets: list[torch.Tensor],
    calls: list[Call],
    precision: str = "fp32",
) -> float:
    """Mean of (block(x) - target)^2 over all batches."""
    device = next(block.parameters()).device
    total = torch.zeros((), device=device, dtype=torch.float64)
    for x, target, call in zip(inputs, targets, calls, strict=True):
        with arithmetic(device, precision):
            out = replay(block, x, call)
        total += (out.float() - target.to(device)).square().sum(dtype=torch.float64)
    return float(total) / sum(target.numel() for target in targets)


def make_optimizer(
    groups: dict[str, list[nn.Parameter]],
    lr: float,
    factor_lr: float,
    final_lr: float,
    steps: int,
    betas: tuple[float, float] = BETAS,
):
    """Adam over the groups of `trainable`, and a cosine schedule from `lr` to `final_lr * lr` in `steps` steps."""
    rates = [
        {"params": parameters, "lr": lr * (factor_lr if name == "factors" else 1)}
        for name, parameters in groups.items()
        if parameters
    ]
    device = rates[0]["params"][0].device
    on_cuda = device.type == "cuda"
    for group in rates if on_cuda else ():
        group["lr"] = torch.tensor(group["lr"], device=device)  # a captured step reads it
    optimizer = torch.optim.Adam(rates, betas=betas, fused=on_cuda, capturable=on_cuda)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _cosine(step / steps, final_lr)
    )


@contextmanager
def only_trained(module: nn.Module, groups: dict[str, list[nn.Parameter]]) -> Iterator[None]:
    """Only these have gradients inside: others, such as those of layers that stay dense, would collect them too."""
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    trained = {id(parameter) for group in groups.values() for parameter in group}
    for parameter in flags:
        parameter.requires_grad_(id(parameter) in trained)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            if id(parameter) in trained:
                parameter.grad = None


def _cosine(progress: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def group_batches(sizes: list[int], least: int) -> list[list[int]]:
    """Indices of consecutive batches, grouped into steps of at least `least` in size (the last may have less)."""
    steps, held = [[]], 0
    for index, size in enumerate(sizes):
        if held >= least:
            steps.append([])
            held = 0
        steps[-1].append(index)
        held += size
    return steps


def snapshot(parameters: list[nn.Parameter], device: str | None = None) -> list[torch.Tensor]:
    """Copies of parameters, where they are or on a device."""
    return [parameter.detach().to(device or parameter.device, copy=True) for parameter in parameters]


def restore(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
