"""Transformer matching (arXiv 2603.01376, section 4): refine one compressed block against its dense self.

Minimises || block_compressed(x) - block_dense(x) ||^2 over the nonzeros of S, the factors, the norms and the biases
of the block, on inputs x that already passed the compressed blocks before it.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import replay
from .checks import check_choice, check_integer, check_number
from .graphed import Graphed
from .precision import LARGE, PRECISIONS, arithmetic
from .solvers import Decomposition

Call = tuple[tuple, dict]

# The paper names no betas. With Adam's usual 0.999 the large first gradients would damp all of the few hundred steps.
BETAS = (0.9, 0.9)


@dataclass(frozen=True)
class TMOptions:
    """Options of transformer matching.

    Attributes:
        passes: over the calibration windows.
        lr: Adam's first step size.
        factor_lr: the same for A and B, as a multiple of `lr`.
        final_lr: the last step size, as a share of the first; a cosine leads there.
        batch_size: windows a step.
        target: what the block's output is to match: "block", the dense block's output on the same inputs (the
            published target); "stream", the dense model's own activations there, which also makes up for the blocks
            before; "mean", the mean of both.
        precision: of the products on a GPU: "fp32", "tf32", "bf16" (autocast with FP32 masters; hidden states between
            blocks are then kept in BF16), or "auto": "bf16" where a layer of the block has more than 2^22 weights, else
            "tf32". The forward passes of the layer solves follow it too.
    """

    passes: int = 20
    lr: float = 2e-5
    factor_lr: float = 1.0
    final_lr: float = 0.2
    batch_size: int = 8
    target: str = "block"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_schedule("tm", self)
        check_choice("tm.target", self.target, ("block", "stream", "mean"))
        check_choice("tm.precision", self.precision, ("auto", *PRECISIONS))


def check_schedule(field: str, options: Any) -> None:
    """What training one block and training the whole model have in common: steps and step sizes."""
    check_integer(f"{field}.passes", options.passes, 1)
    check_integer(f"{field}.batch_size", options.batch_size, 1)
    check_number(f"{field}.lr", options.lr, 0, exclusive=True)
    check_number(f"{field}.factor_lr", options.factor_lr, 0)
    check_number(f"{field}.final_lr", options.final_lr, 0)


def resolve_precision(options: TMOptions, block: nn.Module) -> TMOptions:
    """`options` with what "auto" means for a block."""
    if options.precision != "auto":
        return options
    return replace(options, precision="bf16" if large(block.parameters()) else "tf32")


def large(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the work on them is bound by its arithmetic, not by launching it."""
    return any(parameter.numel() > LARGE for parameter in parameters)


class WorkingLinear(nn.Module):
    """S + B A of one layer in FP32 while its block is at work.

    S is dense with zeros; its gradient is masked, so Adam never moves an entry outside the support.
    """

    def __init__(self, decomposition: Decomposition, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.S = nn.Parameter(decomposition.S)
        self.A = None if decomposition.A is None else nn.Parameter(decomposition.A)
        self.B = None if decomposition.B is None else nn.Parameter(decomposition.B)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float())
        self.register_buffer("mask", decomposition.mask)
        self.S.register_hook(lambda grad: grad * self.mask)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """S + B A, cheaper than two thin products with as many inputs as training has. Some blocks read it (T5)."""
        return self.S if self.A is None else self.S + self.B @ self.A

    def decomposition(self) -> Decomposition:
        factors = (None, None) if self.A is None else (self.A.detach(), self.B.detach())
        return Decomposition(self.S.detach(), self.mask, *factors)


def trainable(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What refinement trains: "S" of every `WorkingLinear`, its "factors", and "vectors" (norms and biases)."""
    layers = [layer for layer in module.modules() if isinstance(layer, WorkingLinear)]
    return {
        "S": [layer.S for layer in layers],
        "factors": [factor for layer in layers if layer.A is not None for factor in (layer.A, layer.B)],
        "vectors": [p for p in module.parameters() if p.ndim == 1 and p.is_floating_point()],
    }


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


def match_block(
    block: nn.Module,
    inputs: list[torch.Tensor],
    targets: list[torch.Tensor],
    calls: list[Call],
    options: TMOptions,
    seed: int,
    on_pass: Callable[[float], None] = lambda loss: None,
) -> dict:
    """Trains a block whose layers are `WorkingLinear`, in place, and leaves its best iterate in it.

    Args:
        block: on the compute device, in FP32.
        inputs: hidden states (batch, length, hidden), one tensor a batch, on any device.
        targets: what the block's outputs are to match, see `TMOptions.target`.
        calls: the block's other arguments, see `blocks.record_calls`.
        seed: of the order of the steps.
        on_pass: called after every pass with its mean relative loss.

    Returns:
        loss_before, loss_after (mean squared errors), best_pass (0: the start), passes, seconds.
    """
    started = time.perf_counter()
    groups = trainable(block)
    parameters = [parameter for group in groups.values() for parameter in group]
    start = best = snapshot(
        parameters, "cpu" if large(block.parameters()) else None
    )  # needed only if all goes wrong
    before = after = mean_squared_error(block, inputs, targets, calls, options.precision)
    best_loss, best_pass, passes = math.inf, 0, 0
    if before > 0:
        with closing(_train(block, groups, inputs, targets, calls, options, seed, before)) as losses:
            for loss in losses:
                passes += 1
                on_pass(loss)
                if loss < best_loss:
                    best, best_loss, best_pass = snapshot(parameters), loss, passes
        restore(parameters, best)
        after = mean_squared_error(block, inputs, targets, calls, options.precision)
    if not after < before:  # NaN included
        restore(parameters, start)
        after, best_pass = before, 0
    return {
        "loss_before": before,
        "loss_after": after,
        "best_pass": best_pass,
        "passes": passes,
        "seconds": time.perf_counter() - started,
    }


def _train(block, groups, inputs, targets, calls, options: TMOptions, seed: int, scale: float):
    """Yields the mean loss, relative to `scale`, after every pass; ends early on NaN.

    The relative loss keeps gradients far above Adam's epsilon, whatever the size of the block's error.
    """
    device = next(block.parameters()).device
    chunks = group_batches([len(batch) for batch in inputs], options.batch_size)
    generator = torch.Generator().manual_seed(seed)
    total = options.passes * len(chunks)
    optimizer, schedule = adam(groups, options.lr, options.factor_lr, options.final_lr, total)
    losses = torch.zeros((), device=device)

    def step(batches: list[tuple[torch.Tensor, torch.Tensor, Call]]) -> None:
        size = sum(target.numel() for _, target, _ in batches) * scale
        optimizer.zero_grad()
        for x, target, call in batches:
            with arithmetic(device, options.precision):
                out = replay(block, x, call)
                loss = (out.float() - target.to(device)).square().sum() / size
                loss.backward()
            losses.add_(loss.detach())
        optimizer.step()

    run = step if large(block.parameters()) else Graphed(step, device)
    with only_trained(block, groups), torch.enable_grad():
        for _ in range(options.passes):
            losses.zero_()
            for index in torch.randperm(len(chunks), generator=generator).tolist():
                run([(inputs[batch], targets[batch], calls[batch]) for batch in chunks[index]])
                schedule.step()
            mean = float(losses) / len(chunks)
            if not math.isfinite(mean):
                break
            yield mean


def adam(
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
