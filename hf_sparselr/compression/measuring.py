"""Measure a dense model for an allocation: weights, Gram matrices, and the loss of a block when a weight changes."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..config.sparselr_config import SparseLRConfig
from ..data.model_inputs import Sample
from ..solvers.gram import ScaledGram
from ..utils.precision import arithmetic
from ..utils.world import ALONE, World
from .activations import Workplace
from .allocation import DenseGroup
from .block import layers_of, working_copy
from .block_source import BlockSource
from .capture import BrokenChainError, Call, capture_block_inputs, capture_calls, replay
from .layer_inputs import gram_of_inputs, grams_of_experts, group_by_input
from .layer_solving import naming
from .linear_layers import dense_weight, set_dense_weight
from .plan import Layer
from .survey import Survey

TRIAL_WINDOWS = 8  # on which the loss of a block is measured


@torch.no_grad()
def dense_groups(
    model: nn.Module,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    batches: list[Sample],
    segments: list[dict[str, nn.Module]],
    survey: Survey,
    source: BlockSource,
    world: World = ALONE,
) -> Iterator[DenseGroup]:
    """The planned layers of the dense model, of one block after the other.

    Args:
        batches: of this process.
        segments: chains of blocks, and single blocks, in the order of the model's calls.
        source: where the weights of the blocks are.
        world: the processes that measure together; all get the same Gram matrices and losses.
    """
    bar = transformers_logging.tqdm(total=sum(map(len, segments)), desc="Measuring blocks", unit="block")
    for segment in segments:
        for name, block, hidden, calls in _block_inputs(model, config, batches, segment, survey, source):
            place = Workplace.of(block, config, world)
            dense, hidden = working_copy(block, place.device), place.keep(hidden)
            yield from _groups_of_block(name, dense, plan, config, hidden, calls, place)
            bar.update()
    bar.close()


def _block_inputs(
    model: nn.Module,
    config: SparseLRConfig,
    batches: list[Sample],
    segment: dict[str, nn.Module],
    survey: Survey,
    source: BlockSource,
) -> Iterator[tuple[str, nn.Module, list[torch.Tensor], list[Call]]]:
    """(name, block, hidden states, other arguments) of the blocks of a chain, or of a single block."""
    if all(survey.most_calls[name] == 1 for name in segment):
        with suppress(BrokenChainError):
            with source.on_call():
                recording = capture_block_inputs(model, segment, batches)
            hidden = recording.inputs
            for name in segment:
                with source.loaded(name) as block:
                    yield name, block, hidden, recording.calls[name]
                    place = Workplace.of(block, config)
                    dense = working_copy(block, place.device)
                hidden = place.forward(dense, place.keep(hidden), recording.calls[name])
            return
    for name in segment:
        with source.on_call():
            hidden, calls, _ = capture_calls(model, name, batches, survey.most_calls[name] == 1)
        with source.loaded(name) as block:
            yield name, block, hidden, calls


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
        if group.experts:
            for layer, gram, *_ in grams_of_experts(block, group, hidden, calls, place):
                name_of = layers[layer].name
                with naming(name_of):
                    scaled = ScaledGram(gram, config.damping)
                weights = {name_of: dense_weight(block.get_submodule(layer))}
                yield DenseGroup(name, weights, gram, scaled, output_loss)
            continue
        weights = {layers[inner].name: dense_weight(block.get_submodule(inner)) for inner in group.layers}
        gram = gram_of_inputs(block, group, hidden, calls, place)
        with naming(layers[group.layers[0]].name):
            scaled = ScaledGram(gram, config.damping)
        yield DenseGroup(name, weights, gram, scaled, output_loss)


def _output_loss(
    name: str, block: nn.Module, hidden: list[torch.Tensor], calls: list[Call], place: Workplace
) -> Callable[[str, torch.Tensor], float]:
    """See `DenseGroup`. Measured on the first windows, in TF32 at least: BF16 would hide small losses."""
    world = place.world
    few = world.of_first(-(-TRIAL_WINDOWS // len(hidden[0])) if hidden else 0)
    own = len(range(world.rank, few, world.size))  # batches are spread in turns

    @torch.no_grad()
    def forward() -> list[torch.Tensor]:
        with arithmetic(place.device, "tf32"):
            return [replay(block, batch, call) for batch, call in zip(hidden[:own], calls[:own], strict=True)]

    before = forward()
    energy = world.total(sum(float(batch.square().sum()) for batch in before), place.device)
    if not math.isfinite(energy):
        raise ValueError(f"{name}: the outputs of the dense block hold NaN or Inf")

    def output_loss(layer: str, weight: torch.Tensor) -> float:
        module = block.get_submodule(layer.removeprefix(f"{name}."))
        original = dense_weight(module)
        set_dense_weight(module, weight)
        pairs = zip(forward(), before, strict=True)
        set_dense_weight(module, original)
        return world.total(sum(float((new - old).square().sum()) for new, old in pairs), place.device) / energy

    return output_loss
