"""The training loop of transformer matching and distillation.

Both give it steps of batches and a function that adds a batch's gradients. The loop has the optimiser, the schedule,
the order of the steps, the best state and the early end.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config.options import DistillOptions, TMOptions
from ..utils.cuda_graphs import GraphedCallable
from ..utils.precision import LARGE
from ..utils.world import ALONE, World

Groups = dict[str, list[nn.Parameter]]

SMALL_GRADIENT = 2**20  # entries: smaller gradients are summed over processes as one


@dataclass
class Training:
    """What a training run did.

    Attributes:
        losses: the mean loss of every pass that ended with a finite one.
        best_pass: the best of these passes, from 1; 0 where there is none.
    """

    losses: list[float] = field(default_factory=list)
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
    keep_best: bool,
    judge: Callable[[], float] | None = None,
    world: World = ALONE,
) -> Training:
    """Trains parameters of a module in place with Adam and a cosine schedule.

    A pass without a finite loss is the last one.

    Args:
        groups: {"S", "factors", "vectors": parameters}, on one device. No other parameter gets a gradient.
        steps: the batches of every step, nested containers of tensors.
        size: the number by which the losses of a step's batches are divided. A tensor if steps may differ in it.
        backward: (batch, size) -> the batch's loss / size, a scalar without gradient; adds its gradient.
        betas: of Adam.
        seed: of the order of the steps.
        on_pass: called after every pass with its mean loss.
        keep_best: leave the state after the best pass. Otherwise the last one stays.
        judge: the loss of a state, by which the best pass is chosen; None takes the mean loss of the pass.
        world: the processes that train the same parameters; each has its own batches of every step.
    """
    parameters = [parameter for group in groups.values() for parameter in group]
    device = parameters[0].device
    optimizer, schedule = make_optimizer(groups, options, options.passes * len(steps), betas)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), device=device)
    result, best, least = Training(), None, math.inf

    sizes = [size(batches) for batches in steps]

    def step(batches: list[Any], divisor: float | torch.Tensor) -> None:
        optimizer.zero_grad()
        for batch in batches:
            total.add_(backward(batch, divisor))
        sum_gradients(parameters, world)
        optimizer.step()

    run = step if is_large(parameters) else GraphedCallable(step, device)
    with only_trained(module, groups), torch.enable_grad():
        for number in range(1, options.passes + 1):
            total.zero_()
            for index in torch.randperm(len(steps), generator=generator).tolist():
                run(steps[index], sizes[index])
                schedule.step()
            mean = world.total(total, device) / len(steps)
            if not math.isfinite(mean):
                break
            loss = judge() if judge and keep_best else mean
            if loss < least:
                result.best_pass, least = number, loss
                best = snapshot(parameters) if keep_best else None
            result.losses.append(mean)
            on_pass(mean)
    if best is not None:
        restore(parameters, best)
    return result


def is_large(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the work on them is bound by its arithmetic. Otherwise launching it takes longer."""
    return any(parameter.numel() > LARGE for parameter in parameters)


def make_optimizer(
    groups: Groups, options: TMOptions | DistillOptions, steps: int, betas: tuple[float, float]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam, and a cosine schedule from `lr` to `final_lr * lr` over all steps."""
    rates = [
        {"params": parameters, "lr": options.lr * (options.factor_lr if name == "factors" else 1)}
        for name, parameters in groups.items()
        if parameters
    ]
    device = rates[0]["params"][0].device
    on_cuda = device.type == "cuda"
    for group in rates if on_cuda else ():
        group["lr"] = torch.tensor(group["lr"], device=device)  # a captured step reads it
    optimizer = torch.optim.Adam(rates, betas=betas, fused=on_cuda, capturable=on_cuda)

    def cosine(step: int) -> float:
        progress = min(step / steps, 1.0)
        return options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)


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


def snapshot(parameters: list[nn.Parameter], device: str | None = None) -> list[torch.Tensor]:
    """Copies of parameters, where they are or on a device."""
    return [parameter.detach().to(device or parameter.device, copy=True) for parameter in parameters]


def restore(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    """Copies the values of a snapshot back."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def hold_back(windows: list[Any]) -> int:
    """How many windows at the end of a list refinement does not train on, but is judged by: a sixteenth, of 8 or more.

    The loss on trained windows falls also where the model gets worse on others.
    """
    return max(1, len(windows) // 16) if len(windows) >= 8 else 0
