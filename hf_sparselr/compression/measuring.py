"""Measure a dense model for an allocation: weights, Gram matrices, and the loss of a block when a weight changes."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..config.sparselr_config import SparseLRConfig
from ..solvers.gram import ScaledGram
from ..utils.precision import arithmetic
from .activations import Workplace
from .allocation import DenseGroup
from .block import layers_of, working_copy
from .capture import Call, capture_block_inputs, replay
from .layer_inputs import gram_of_inputs, group_by_input
from .layer_solving import naming
from .linear_layers import dense_weight, set_dense_weight
from .model_structure import find_stacks
from .plan import Layer

TRIAL_WINDOWS = 8  # on which the loss of a block is measured


@torch.no_grad()
def dense_groups(
    model: nn.Module, plan: dict[str, Layer], config: SparseLRConfig, batches: list[torch.Tensor]
) -> Iterator[DenseGroup]:
    """The planned layers of the dense model, of one block after the other."""
    stacks = find_stacks(model)
    bar = transformers_logging.tqdm(
        total=sum(map(len, stacks.values())), desc="Measuring blocks", unit="block"
    )
    for stack_name, stack in stacks.items():
        recording = capture_block_inputs(model, stack, batches)
        hidden = recording.inputs
        for index, calls in enumerate(recording.calls):
            name, place = f"{stack_name}.{index}", Workplace.of(stack[index], config)
            block, hidden = working_copy(stack[index], place.device), place.keep(hidden)
            yield from _groups_of_block(name, block, plan, config, hidden, calls, place)
            hidden = place.forward(block, hidden, calls)
            bar.update()
    bar.close()


def _groups_of_block(
    name: str,
    block: nn.Module,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    hidden: list[torch.Tensor],
    calls: list[Call],
    place: Workplace,
) -> Iterator[DenseGroup]:
    output_loss = _output_loss(name, block, hidden, calls, place)
    layers = layers_of(name, block, plan)
    for group in group_by_input(block, list(layers), hidden, calls, place):
        weights = {layers[inner].name: dense_weight(block.get_submodule(inner)) for inner in group.layers}
        gram = gram_of_inputs(block, group, hidden, calls, place)
        with naming(layers[group.layers[0]].name):
            scaled = ScaledGram(gram, config.damping)
        yield DenseGroup(name, weights, gram, scaled, output_loss)


def _output_loss(
    name: str, block: nn.Module, hidden: list[torch.Tensor], calls: list[Call], place: Workplace
) -> Callable[[str, torch.Tensor], float]:
    """See `DenseGroup`. Measured on the first windows, in TF32 at least: BF16 would hide small losses."""
    few = -(-TRIAL_WINDOWS // len(hidden[0]))

    @torch.no_grad()
    def forward() -> list[torch.Tensor]:
        with arithmetic(place.device, "tf32"):
            return [replay(block, batch, call) for batch, call in zip(hidden[:few], calls[:few], strict=True)]

    before = forward()
    energy = sum(float(batch.square().sum()) for batch in before)
    if not math.isfinite(energy):
        raise ValueError(f"{name}: the outputs of the dense block hold NaN or Inf")

    def output_loss(layer: str, weight: torch.Tensor) -> float:
        module = block.get_submodule(layer.removeprefix(f"{name}."))
        original = dense_weight(module)
        set_dense_weight(module, weight)
        pairs = zip(forward(), before, strict=True)
        set_dense_weight(module, original)
        return sum(float((new - old).square().sum()) for new, old in pairs) / energy

    return output_loss
