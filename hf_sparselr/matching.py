"""Transformer matching (arXiv 2603.01376, section 4): refine one compressed block against its dense self.

Minimises || block_compressed(x) - block_dense(x) ||^2 over the nonzeros of S, the factors, the norms and the biases
of the block, on inputs x that already passed the compressed blocks before it.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import replay
from .checks import check_choice, check_integer, check_number
from .solvers import Decomposition

Call = tuple[tuple, dict]

# The paper names no betas. With 0.999 the large first gradients would damp all of the few hundred steps.
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TMOptions:
    """Options of transformer matching; the defaults are the published settings.

    Attributes:
        passes: over the calibration windows.
        lr: Adam's first step size.
        final_lr: its last one, as a share of `lr`; a cosine leads there.
        batch_size: windows a step.
        precision: "fp32", or "bf16": autocast with FP32 masters, several times faster on a GPU.
    """

    passes: int = 20
    lr: float = 2e-5
    final_lr: float = 0.2
    batch_size: int = 8
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_integer("tm.passes", self.passes, 1)
        check_integer("tm.batch_size", self.batch_size, 1)
        check_number("tm.lr", self.lr, 0, exclusive=True)
        check_number("tm.final_lr", self.final_lr, 0)
        check_choice("tm.precision", self.precision, ("fp32", "bf16"))


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
        out = F.linear(inputs, self.S, self.bias)
        return out if self.A is None else out + F.linear(F.linear(inputs, self.A), self.B)

    @property
    def weight(self) -> torch.Tensor:
        """S + B A: some blocks read a layer's weight, or its dtype (T5)."""
        return self.S if self.A is None else self.S + self.B @ self.A

    def decomposition(self) -> Decomposition:
        factors = (None, None) if self.A is None else (self.A.detach(), self.B.detach())
        return Decomposition(self.S.detach(), self.mask, *factors)


def trainable(block: nn.Module) -> list[nn.Parameter]:
    """What TM trains: the decompositions, and every vector of the block (norms and biases)."""
    parts = {id(p): p for m in block.modules() if isinstance(m, WorkingLinear) for p in m.parameters()}
    parts.update({id(p): p for p in block.parameters() if p.ndim == 1 and p.is_floating_point()})
    return list(parts.values())


@torch.no_grad()
def mean_squared_error(
    block: nn.Module, inputs: list[torch.Tensor], targets: list[torch.Tensor], calls: list[Call]
) -> float:
    """Mean of (block(x) - target)^2 over all batches."""
    total = sum(
        (replay(block, x, call) - target.to(x.device)).square().sum(dtype=torch.float64)
        for x, target, call in zip(inputs, targets, calls, strict=True)
    )
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
        inputs: hidden states (batch, length, hidden), one tensor a batch, on the block's device.
        targets: the dense block's outputs on the same inputs.
        calls: the block's other arguments, see `blocks.record_calls`.
        seed: of the order of the steps.
        on_pass: called after every pass with its mean relative loss.

    Returns:
        loss_before, loss_after (mean squared errors, FP32), best_pass (0: the start), passes, seconds.
    """
    started = time.perf_counter()
    parameters = trainable(block)
    start = best = _snapshot(parameters)
    before = after = mean_squared_error(block, inputs, targets, calls)
    best_loss, best_pass, passes = math.inf, 0, 0
    if before > 0:
        for loss in _train(block, parameters, inputs, targets, calls, options, seed, before):
            passes += 1
            on_pass(loss)
            if loss < best_loss:
                best, best_loss, best_pass = _snapshot(parameters), loss, passes
        _restore(parameters, best)
        after = mean_squared_error(block, inputs, targets, calls)
    if not after < before:  # NaN included
        _restore(parameters, start)
        after, best_pass = before, 0
    return {
        "loss_before": before,
        "loss_after": after,
        "best_pass": best_pass,
        "passes": passes,
        "seconds": time.perf_counter() - started,
    }


def _train(block, parameters, inputs, targets, calls, options: TMOptions, seed: int, scale: float):
    """Yields the mean loss, relative to `scale`, after every pass; ends early on NaN.

    The relative loss keeps gradients far above Adam's epsilon, whatever the size of the block's error.
    """
    device = inputs[0].device
    chunks = _chunks(inputs, options.batch_size)
    generator = torch.Generator().manual_seed(seed)
    flags = {parameter: parameter.requires_grad for parameter in block.parameters()}
    trained = set(parameters)
    for parameter in flags:  # layers that stay dense would collect gradients too
        parameter.requires_grad_(parameter in trained)
    total = options.passes * len(chunks)
    optimizer = torch.optim.Adam(parameters, lr=options.lr, betas=BETAS, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _cosine(step / total, options.final_lr)
    )
    with torch.enable_grad():
        for _ in range(options.passes):
            losses = torch.zeros((), device=device)
            for index in torch.randperm(len(chunks), generator=generator).tolist():
                size = sum(targets[batch].numel() for batch in chunks[index]) * scale
                for batch in chunks[index]:
                    with _autocast(device, options.precision):
                        out = replay(block, inputs[batch], calls[batch])
                    loss = (out.float() - targets[batch].to(device)).square().sum() / size
                    loss.backward()
                    losses += loss.detach()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            mean = float(losses) / len(chunks)
            if not math.isfinite(mean):
                break
            yield mean
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)


def _cosine(progress: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _chunks(inputs: list[torch.Tensor], windows: int) -> list[list[int]]:
    """Batch indices, grouped into steps of at least `windows` windows (the last may have fewer)."""
    chunks, held = [[]], 0
    for index, batch in enumerate(inputs):
        if held >= windows:
            chunks.append([])
            held = 0
        chunks[-1].append(index)
        held += batch.shape[0]
    return chunks


def _autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _snapshot(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _restore(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
