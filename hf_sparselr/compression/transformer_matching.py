"""Transformer matching (arXiv 2603.01376, section 4): refine one compressed block against its dense self.

Minimises || block_compressed(x) - block_dense(x) ||^2 over the nonzeros of S, the factors, the norms and the biases
of the block, on inputs x that already passed the compressed blocks before it.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing

import torch
from torch import nn

from ..config.options import TMOptions
from ..utils.cuda_graphs import GraphedCallable
from ..utils.precision import arithmetic
from .capture import replay
from .training_loop import (
    Call,
    group_batches,
    large,
    make_optimizer,
    mean_squared_error,
    only_trained,
    restore,
    snapshot,
)
from .working_linear import trainable


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
        calls: the block's other arguments, see `blocks.capture_block_inputs`.
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
    optimizer, schedule = make_optimizer(groups, options.lr, options.factor_lr, options.final_lr, total)
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

    run = step if large(block.parameters()) else GraphedCallable(step, device)
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
