"""Transformer matching (TM; arXiv 2603.01376, section 4): refine one compressed block against its dense self.

Minimises || block_compressed(x) - block_dense(x) ||^2 over the nonzeros of S, the factors, the norms and the biases
of the block, on inputs x that already passed the compressed blocks before it.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..config.options import TMOptions
from ..utils.precision import arithmetic, available
from ..utils.world import ALONE, World
from .capture import Call, replay
from .fused_operators import fused_operators
from .padding import position_mask
from .rounded_weights import rounded_weights
from .training_loop import Training, is_large, shared_steps, train
from .working_linear import trainable

# The paper names no betas. With Adam's usual 0.999 the large first gradients would damp all of the few hundred steps.
BETAS = (0.9, 0.9)


def resolve_precision(options: TMOptions, block: nn.Module, device: torch.device) -> TMOptions:
    """The options with a precision for a block in place of "auto", and one that the device has."""
    chosen = options.precision
    if chosen == "auto":
        chosen = "bf16" if is_large(block.parameters()) else "tf32"
    return replace(options, precision=available(chosen, device))


def match_block(
    block: nn.Module,
    inputs: list[torch.Tensor],
    targets: list[torch.Tensor],
    calls: list[Call],
    options: TMOptions,
    seed: int,
    on_pass: Callable[[float], None] = lambda loss: None,
    kept_back: int = 0,
    fixed: frozenset[str] = frozenset(),
    world: World = ALONE,
) -> dict:
    """Trains a block whose layers are `WorkingLinear`, in place, and leaves its best state in it, if need be the start.

    Args:
        block: on the compute device, in FP32.
        inputs: hidden states (batch, length, hidden), one tensor a batch, on any device.
        targets: the outputs to match, of the same shapes; see `TMOptions.target`.
        calls: the block's other arguments, see `capture_block_inputs`.
        seed: of the order of the steps.
        on_pass: called after every pass with its mean loss, relative to `loss_before`.
        kept_back: so many batches at the end are not trained on. The best state is the best one on them. With 0, it is
            judged on the batches that it is trained on.
        fixed: names of parameters of the block that are not trained.
        world: the processes that train the same block, each on its own batches.

    Returns:
        loss_before, loss_after (mean squared errors on the judging batches), train_loss (the mean of every pass) and
        kept_back_loss (after every pass; empty with `kept_back` = 0), both relative to loss_before, best_pass (0: the
        start), passes, seconds.
    """
    started = time.perf_counter()
    groups = trainable(block, fixed)
    batches = list(zip(inputs, targets, calls, strict=True))
    trained = batches[: len(batches) - kept_back]
    apart = world.any(kept_back > 0)
    judging = batches[len(trained) :] if apart else trained

    def loss() -> float:
        return mean_squared_error(block, judging, options.precision, world)

    before, training = loss(), Training()
    if before > 0:
        with fused_operators(block, next(block.parameters()).device, options.precision):
            training = _train(block, groups, trained, options, seed, before, on_pass, lambda: loss() / before, world)
    best = training.best_pass
    return {
        "loss_before": before,
        "loss_after": before * training.judged[best - 1] if best else before,
        "train_loss": training.losses,
        "kept_back_loss": training.judged if apart else [],
        "best_pass": best,
        "passes": len(training.losses),
        "seconds": time.perf_counter() - started,
    }


def _train(block, groups, batches, options: TMOptions, seed: int, scale: float, on_pass, judge, world: World):
    """Losses are relative to `scale`, so that gradients stay far above Adam's epsilon when the error is small."""
    device = next(block.parameters()).device
    indices = shared_steps([len(x) for x, _, _ in batches], options.batch_size, world)
    steps = [[batches[index] for index in group] for group in indices]

    def size(step: list) -> float | torch.Tensor:
        total = world.total(sum(_entries(target, call) for _, target, call in step), device) * scale
        masked = any(call.masks for _, _, call in step)
        return torch.tensor(total, device=device) if masked else total

    def backward(batch: tuple, size: float | torch.Tensor) -> torch.Tensor:
        x, target, call = batch
        with arithmetic(device, options.precision):
            out = replay(block, x, call)
            loss = _difference(out, target, call).square().sum() / size
            loss.backward()
        return loss.detach()

    return train(
        block,
        groups,
        steps,
        size,
        backward,
        options,
        BETAS,
        seed,
        on_pass,
        judge,
        world,
    )


@torch.no_grad()
def mean_squared_error(
    block: nn.Module,
    batches: list[tuple[torch.Tensor, torch.Tensor, Call]],
    precision: str = "fp32",
    world: World = ALONE,
) -> float:
    """Mean of (block(x) - target)^2 over batches (x, target, call) of all processes."""
    device = next(block.parameters()).device
    total = torch.zeros((), device=device, dtype=torch.float64)
    with (
        rounded_weights(block, precision),
        fused_operators(block, device, precision),
        arithmetic(device, precision),
    ):
        for x, target, call in batches:
            out = replay(block, x, call)
            total += _difference(out, target, call).square().sum(dtype=torch.float64)
    entries = world.total(sum(_entries(target, call) for _, target, call in batches), device)
    return world.total(total, device) / entries


def _entries(target: torch.Tensor, call: Call) -> int:
    """How many entries of an output count: those that are no padding."""
    mask = position_mask(target, call.masks)
    return target.numel() if mask is None else int(mask.sum()) * target[0, 0].numel()


def _difference(out: torch.Tensor, target: torch.Tensor, call: Call) -> torch.Tensor:
    """out - target, zero at padding."""
    difference = out.float() - target.to(out.device)
    mask = position_mask(target, call.masks)
    if mask is None:
        return difference
    return difference.masked_fill(~mask.to(out.device)[(...,) + (None,) * (difference.ndim - 2)], 0.0)
