"""The inputs of a block's layers: which layers share them, and their Gram matrices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn.packed_experts import ExpertStack
from ..solvers.gram import GramAccumulator
from ..utils.precision import arithmetic
from .activations import Workplace
from .capture import Call, replay
from .linear_layers import weight_shape
from .padding import real_rows
from .routing import routed_rows

MOST_ENTRIES = 2**28  # of the Gram matrices of experts at a time, 1 GiB


class _Reached(Exception):  # noqa: N818 (not an error: the rest of the block is not needed)
    pass


@dataclass(frozen=True)
class LayerGroup:
    """Layers with common inputs, so with one Gram matrix.

    Attributes:
        layers: their names in the block.
        called_once: whether a forward pass calls each of them once.
        experts: the layers are the experts of a stack. Each has inputs, and a Gram matrix, of its own.
    """

    layers: list[str]
    called_once: bool
    experts: bool = False


@torch.no_grad()
def group_by_input(
    block: nn.Module, layers: list[str], hidden: list[torch.Tensor], calls: list[Call], place: Workplace
) -> list[LayerGroup]:
    """The layers that were called, in the order of their first calls, grouped by common inputs.

    Two layers share a group if all their calls, one or several, were made with the same tensors in the same order. All
    processes get the same groups, also if some of them have no batches.

    Args:
        layers: names in the block.
    """
    seen: dict[str, list[tuple]] = {}  # (batch, address, shape, stride) of every input of a layer
    alive: list[torch.Tensor] = []  # while they live, equal addresses mean the same tensor

    def note(layer: str, number: int):
        def hook(x: torch.Tensor) -> None:
            seen.setdefault(layer, []).append((number, x.data_ptr(), x.shape, x.stride()))
            alive.append(x)

        return hook

    for number, (batch, call) in enumerate(zip(hidden, calls, strict=True)):
        hooks = {layer: note(layer, number) for layer in layers}
        with hooked(block, hooks), arithmetic(place.device, place.precision):
            replay(block, batch, call)
        if {stack_of(block, layer) for layer in seen} == {stack_of(block, layer) for layer in layers}:
            break  # as a rule the first batch shows it
        alive.clear()
    groups: dict[Any, list[str]] = {}
    for layer, inputs in seen.items():
        stack = stack_of(block, layer)
        groups.setdefault(tuple(inputs) if stack == layer else stack, []).append(layer)
    return _agreed(place.world.objects([_group(block, key, members, layers) for key, members in groups.items()]))


def _agreed(groups_of_processes: list[list[LayerGroup]]) -> list[LayerGroup]:
    """The groups of the process whose batches reached most layers, and those that only others reached."""
    chosen: list[LayerGroup] = []
    for groups in sorted(groups_of_processes, key=lambda groups: -sum(len(group.layers) for group in groups)):
        known = {layer for group in chosen for layer in group.layers}
        chosen += [group for group in groups if known.isdisjoint(group.layers)]
    return chosen


def stack_of(block: nn.Module, layer: str) -> str:
    """The name of the stack of experts that a layer is in, or its own name."""
    parent = layer.rpartition(".")[0]
    return parent if isinstance(block.get_submodule(parent), ExpertStack) else layer


def _group(block: nn.Module, key: Any, members: list[str], layers: list[str]) -> LayerGroup:
    if isinstance(key, str):  # all experts of the stack, in order, those without tokens too
        return LayerGroup([name for name in layers if stack_of(block, name) == key], False, experts=True)
    return LayerGroup(members, called_once=len({number for number, *_ in key}) == len(key))


@torch.no_grad()
def gram_of_inputs(
    block: nn.Module, group: LayerGroup, hidden: list[torch.Tensor], calls: list[Call], place: Workplace
) -> torch.Tensor:
    """X^T X (in, in), FP32, over all inputs of a group in the block as it now is, without padding."""
    layer = group.layers[0]
    accumulator = GramAccumulator(weight_shape(block.get_submodule(layer))[1], place.device)

    masks: tuple[torch.Tensor, ...] = ()

    def collect(x: torch.Tensor) -> None:
        x = real_rows(x, masks)
        accumulator.add(x.bfloat16() if place.precision == "bf16" else x)
        if group.called_once:
            raise _Reached  # the rest of the block is not needed

    with hooked(block, {layer: collect}), place.products(block):
        for batch, call in zip(hidden, calls, strict=True):
            masks = call.masks
            with suppress(_Reached):
                replay(block, batch, call)
    return place.world.sum_(accumulator.gram)


@torch.no_grad()
def grams_of_experts(
    block: nn.Module, group: LayerGroup, hidden: list[torch.Tensor], calls: list[Call], place: Workplace
) -> Iterator[tuple[str, torch.Tensor, int, float]]:
    """(layer, H (in, in), number of its tokens, their share of all) of the experts of a stack, in order.

    An expert sees few tokens. H is X^T X of its own ones and as many tokens as it has inputs at the mean over all
    experts: the fewer its own, the nearer is H to the mean's. Where a layer follows another one of its expert, tokens
    are weighted by the router (see `routing`).
    """
    width = weight_shape(block.get_submodule(group.layers[0]))[1]
    share = max(1, MOST_ENTRIES // width**2)
    parts = [group.layers[start : start + share] for start in range(0, len(group.layers), share)]
    pooled = GramAccumulator(width, place.device)
    if len(parts) > 1:
        _accumulate(block, dict.fromkeys(group.layers, pooled), hidden, calls, place)
    for part in parts:
        grams = {layer: GramAccumulator(width, place.device) for layer in part}
        _accumulate(block, grams, hidden, calls, place)
        if len(parts) == 1:
            pooled.gram.copy_(torch.stack([each.gram for each in grams.values()]).sum(0))
            pooled.rows = sum(each.rows for each in grams.values())
        for layer in part:
            own = grams.pop(layer)
            rows = max(pooled.rows, 1)
            yield layer, own.gram.add_(pooled.gram, alpha=width / rows), own.rows, own.rows / rows


def _accumulate(
    block: nn.Module,
    accumulators: dict[str, GramAccumulator],
    hidden: list[torch.Tensor],
    calls: list[Call],
    place: Workplace,
) -> None:
    """Adds the inputs of a stack's layers, those of all processes, to their accumulators in one pass."""

    def collect(accumulator: GramAccumulator) -> Callable[[torch.Tensor], None]:
        return lambda x: accumulator.add(x.bfloat16() if place.precision == "bf16" else x)

    hooks = {layer: collect(accumulator) for layer, accumulator in accumulators.items()}
    with (
        routed_rows(block, stack_of(block, next(iter(hooks))), hooks) as (routed, prepared),
        hooked(block, prepared),
        place.products(block),
    ):
        for batch, call in zip(hidden, calls, strict=True):
            routed.masks = call.masks
            replay(block, batch, call)
    for accumulator in {id(each): each for each in accumulators.values()}.values():
        place.world.sum_(accumulator.gram)
        accumulator.rows = int(place.world.total(accumulator.rows, place.device))


@contextmanager
def hooked(block: nn.Module, hooks: dict[str, Callable]) -> Iterator[None]:
    """Inside, every call of the named layers first calls their hook with the layer's input."""

    def pre_hook(hook: Callable) -> Callable:
        return lambda module, args, kwargs: hook(args[0] if args else next(iter(kwargs.values())))

    handles = [
        block.get_submodule(layer).register_forward_pre_hook(pre_hook(hook), with_kwargs=True)
        for layer, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
