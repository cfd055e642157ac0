"""How strongly a block's output depends on each output of its layers.

A solver minimises the squared error of a layer's outputs. An error of one output may change the block's output far more
than an equal error of another one: that of a key which decides attention, or of a channel that a gate opens. To first
order the squared change of the block's output is |J e|^2, with J its Jacobian and e the errors. The diagonal of J^T J
is estimated with random signs r (Hutchinson): the mean of (J^T r)_o^2 is that of output o.
"""

import logging
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..nn.packed_experts import ExpertStack
from .activations import Workplace
from .capture import Call, replay
from .linear_layers import weight_shape
from .padding import position_mask

WINDOWS = 16  # from which the weights are estimated
FLOOR = 0.05  # added to weights of mean 1, since estimates are noisy

logger = logging.getLogger("hf_sparselr")


def output_weights(
    block: nn.Module, layers: Iterable[str], hidden: list[torch.Tensor], calls: list[Call], place: Workplace
) -> dict[str, torch.Tensor]:
    """Weights (out,) of the squared errors of each layer's outputs, FP32, with mean 1 + `FLOOR`.

    Experts, each of which sees few tokens, get none, nor do layers on which the block's output does not depend. Where
    the block cannot be differentiated, no layer gets any, and a warning says so. All processes get the same weights.

    Args:
        block: dense, on the compute device, in FP32.
        layers: names in the block.
        hidden, calls: the block's inputs, an entry a batch.
    """
    experts = {id(part) for stack in block.modules() if isinstance(stack, ExpertStack) for part in stack.modules()}
    modules = {layer: block.get_submodule(layer) for layer in layers}
    modules = {layer: module for layer, module in modules.items() if id(module) not in experts}
    sums = {layer: torch.zeros(weight_shape(module)[0], device=place.device) for layer, module in modules.items()}
    handles = [module.register_forward_hook(_adding_to(sums[layer])) for layer, module in modules.items()]
    failure = None
    try:
        for batch, call in _chosen(hidden, calls, place):
            _send_signs_back(block, batch, call, place)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of autograd, for operators without a derivative
        failure = error
    finally:
        for handle in handles:
            handle.remove()
    if place.world.any(failure is not None):
        logger.warning("a block cannot be differentiated (%s): errors of all outputs count equally", failure)
        return {}
    sums = {layer: place.world.sum_(total) for layer, total in sums.items()}
    means = {layer: float(total.mean()) for layer, total in sums.items()}
    usable = [layer for layer, mean in means.items() if math.isfinite(mean) and mean > torch.finfo(torch.float32).tiny]
    return {layer: sums[layer] / means[layer] + FLOOR for layer in usable}


def _adding_to(total: torch.Tensor) -> Callable:
    """A forward hook that adds the squares of the gradient at a layer's outputs to `total` (out,)."""

    def add(gradient: torch.Tensor) -> None:
        total.add_(gradient.flatten(0, -2).float().square().sum(0))

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(add)

    return hook


def _chosen(hidden: list[torch.Tensor], calls: list[Call], place: Workplace) -> list[tuple[torch.Tensor, Call]]:
    """This process's share of about `WINDOWS` windows, evenly spread over all. Batches are spread in turns."""
    world = place.world
    count, size = int(world.total(len(hidden), place.device)), max(world.objects(len(hidden[0]) if hidden else 1))
    stride = max(1, count * size // WINDOWS)
    pairs = enumerate(zip(hidden, calls, strict=True))
    return [pair for index, pair in pairs if (index * world.size + world.rank) % stride == 0]


def _send_signs_back(block: nn.Module, batch: torch.Tensor, call: Call, place: Workplace) -> None:
    """Computes J^T r, with the same signs for every window: windows differ anyway, and order does not matter then."""
    generator = torch.Generator(place.device).manual_seed(0)
    with torch.enable_grad(), place.products(block):
        inputs = batch.to(place.device, torch.float32).detach().requires_grad_()
        output = replay(block, inputs.clone(), call)  # some blocks change their inputs in place
        signs = torch.randint(2, output.shape[1:], generator=generator, device=place.device).mul_(2).sub_(1)
        signs = signs.to(output.dtype).expand_as(output)
        mask = position_mask(output, call.masks)
        if mask is not None:
            signs = signs.masked_fill(~mask.to(place.device)[(...,) + (None,) * (output.ndim - 2)], 0.0)
        torch.autograd.grad(output, inputs, signs, allow_unused=True)
