"""The training loop of transformer matching and distillation.

Both give it steps of batches and a function that adds a batch's gradients. The loop has the optimiser, the schedule,
the order of the steps, the best state and the early end.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config.options import DistillOptions, TMOptions
from ..utils.cuda_graphs import GraphedCallable
from ..utils.world import ALONE, World
from .optimizers import Groups, Schedule, is_large, make_optimizer
from .rounded_weights import rounded_weights

SMALL_GRADIENT = 2**20  # entries: smaller gradients are summed over processes as one
TOLERATED = 1.5  # a loss, relative to the best, from which training goes on: it falls again with smaller steps
MOST_MISSES = 3  # passes without a gain, after which training ends


@dataclass
class Training:
    """What a training run did.

    Attributes:
        losses: the mean loss of every pass that ended with a finite one.
        judged: the loss of the state after every such pass, on the judging windows, relative to that of the start.
        best_pass: the pass whose state is left, from 1; 0 where the start is.
    """

    losses: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    best_pass: int = 0


def train(
    module: nn.Module,
    groups: Groups,
    steps: list[list[Any]],
    size: Callable[[list[Any]], float | torch.Tensor],
    backward: Callable[[Any, float | torch.Tensor], torch.Tensor],
    options: TMOptions | DistillOptions,
    betas: tuple[float, float],
    seed: int,
    on_pass: Callable[[float], None],
    judge: Callable[[], float],
    world: World = ALONE,
) -> Training:
    """Trains parameters of a module in place with Adam and a cosine schedule, and leaves their best state.

    After a pass that ends no better than the best state, step sizes are halved; one that ends much worse is undone.
    The third such pass, or one without a finite loss, is the last.

    Args:
        groups: {"S", "factors", "vectors": parameters}, on one device. No other parameter gets a gradient.
        steps: the batches of every step, nested containers of tensors.
        size: the number by which the losses of a step's batches are divided. A tensor if steps may differ in it.
        backward: (batch, size) -> the batch's loss / size, a scalar without gradient; adds its gradient.
        betas: of Adam.
        seed: of the order of the steps.
        on_pass: called after every pass with its mean loss.
        judge: the loss of the present state relative to that of the start, by which the best state is chosen.
        world: the processes that train the same parameters; each has its own batches of every step.
    """
    parameters = [parameter for group in groups.values() for parameter in group]
    device = parameters[0].device
    optimizer = make_optimizer(groups, options, betas)
    schedule = Schedule(optimizer, options.passes * len(steps), options.final_lr)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), device=device)
    large = is_large(parameters)
    best = snapshot(parameters, in_main_memory=large)  # rarely needed
    result, least, misses = Training(), 1.0, 0

    sizes = [size(batches) for batches in steps]

    def step(batches: list[Any], divisor: float | torch.Tensor) -> None:
        optimizer.zero_grad()
        weights.clear()
        for batch in batches:
            total.add_(backward(batch, divisor))
        weights.collect()
        sum_gradients(parameters, world)
        optimizer.step()
        weights.refresh()

    run = step if large else GraphedCallable(step, device)
    rounded = rounded_weights(module, options.precision, trained=True)
    with only_trained(module, groups), rounded as weights, torch.enable_grad():
        for number in range(1, options.passes + 1):
            total.zero_()
            for index in torch.randperm(len(steps), generator=generator).tolist():
                run(steps[index], sizes[index])
                schedule.step()
            mean = world.total(total, device) / len(steps)
            judged = judge() if math.isfinite(mean) else mean
            if not math.isfinite(judged):  # Adam's moments are then spoilt, too
                break
            result.losses.append(mean)
            result.judged.append(judged)
            on_pass(mean)
            if judged < least:
                result.best_pass, least = number, judged
                if number == options.passes:
                    return result
                update(best, parameters)
                continue
            misses += 1
            if misses == MOST_MISSES:
                break
            if judged > TOLERATED * least:
                restore(parameters, best)
                weights.refresh()
            schedule.halve()
    restore(parameters, best)
    return result


@contextmanager
def only_trained(module: nn.Module, groups: Groups) -> Iterator[None]:
    """Inside, only the parameters in `groups` have gradients; others, as of dense layers, would collect them too."""
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


def group_batches(sizes: list[int], least: int) -> list[list[int]]:
    """Indices of consecutive batches, grouped into steps of at least `least` in size. The last may have less."""
    steps, held = [[]], 0
    for index, size in enumerate(sizes):
        if held >= least:
            steps.append([])
            held = 0
        steps[-1].append(index)
        held += size
    return steps


def shared_steps(sizes: list[int], least: int, world: World) -> list[list[int]]:
    """`group_batches` of the batches of all processes, which take turns; of each step the indices of this process."""
    all_sizes = world.objects(sizes)
    turns = [(index, rank) for rank, own in enumerate(all_sizes) for index in range(len(own))]
    turns.sort()
    steps = group_batches([all_sizes[rank][index] for index, rank in turns], least)
    return [[turns[turn][0] for turn in step if turns[turn][1] == world.rank] for step in steps]


def sum_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Replaces every gradient by its sum over all processes."""
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # no batch of this process used it
            parameter.grad = torch.zeros_like(parameter)
    small = [parameter.grad for parameter in parameters if parameter.numel() < SMALL_GRADIENT]
    for parameter in parameters:
        if parameter.numel() >= SMALL_GRADIENT:
            world.sum_(parameter.grad)
    if small:
        joined = world.sum_(torch.cat([gradient.flatten() for gradient in small]))
        for gradient, part in zip(small, joined.split([gradient.numel() for gradient in small]), strict=True):
            gradient.copy_(part.view_as(gradient))


def snapshot(parameters: list[nn.Parameter], in_main_memory: bool = False) -> list[torch.Tensor]:
    """Copies of parameters, where they are or in main memory."""
    device = "cpu" if in_main_memory else None
    copies = [
        torch.empty_like(each, device=device, pin_memory=in_main_memory and each.is_cuda, requires_grad=False)
        for each in parameters
    ]
    update(copies, parameters)
    return copies


def update(values: list[torch.Tensor], parameters: list[nn.Parameter]) -> None:
    """Takes the present parameters into a snapshot."""
    for value, parameter in zip(values, parameters, strict=True):
        value.copy_(parameter.detach(), non_blocking=True)  # later work on the device waits for it, the host does not


def restore(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    """Copies the values of a snapshot back."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def keep_back(windows: list[Any]) -> tuple[list[Any], list[Any]]:
    """Windows to train on, and windows that are kept back to judge by: a sixteenth of 8 or more, evenly spread.

    The loss on trained windows falls also where the model gets worse on others.
    """
    count = max(1, len(windows) // 16) if len(windows) >= 8 else 0
    chosen = {(2 * index + 1) * len(windows) // (2 * count) for index in range(count)}
    trained = [window for index, window in enumerate(windows) if index not in chosen]
    return trained, [windows[index] for index in sorted(chosen)]
