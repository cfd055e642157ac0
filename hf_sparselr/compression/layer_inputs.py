"""The inputs of a block's layers: which layers share them, and their Gram matrices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from ..solvers.gram import GramAccumulator
from ..utils.precision import arithmetic
from .activations import Workplace
from .capture import Call, replay
from .linear_layers import weight_shape
from .padding import real_rows


class _Reached(Exception):  # noqa: N818 (not an error: the rest of the block is not needed)
    pass


@dataclass(frozen=True)
class LayerGroup:
    """Layers with common inputs, so with one Gram matrix.

    Attributes:
        layers: their names in the block.
        called_once: whether a forward pass calls each of them once.
    """

    layers: list[str]
    called_once: bool


@torch.no_grad()
def group_by_input(
    block: nn.Module, layers: list[str], hidden: list[torch.Tensor], calls: list[Call], place: Workplace
) -> list[LayerGroup]:
    """The layers that were called, in the order of their first calls, grouped by common inputs.

    Two layers share a group if all their calls, one or several, were made with the same tensors in the same order.

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
        if seen.keys() == set(layers):
            break  # as a rule the first batch shows it
        alive.clear()
    groups: dict[tuple, list[str]] = {}
    for layer, inputs in seen.items():
        groups.setdefault(tuple(inputs), []).append(layer)
    return [
        LayerGroup(members, called_once=len({number for number, *_ in inputs}) == len(inputs))
        for inputs, members in groups.items()
    ]


@torch.no_grad()
def gram_of_inputs(
    block: nn.Module, group: LayerGroup, hidden: list[torch.Tensor], calls: list[Call], place: Workplace
) -> torch.Tensor:
    """X^T X (in, in), FP32, over all inputs of a group in the block as it now is, without padding."""
    layer = group.layers[0]
    accumulator = GramAccumulator(weight_shape(block.get_submodule(layer))[1], place.device)

    for batch, call in zip(hidden, calls, strict=True):

        def collect(x: torch.Tensor, masks: tuple[torch.Tensor, ...] = call.masks) -> None:
            x = real_rows(x, masks)
            accumulator.add(x.bfloat16() if place.precision == "bf16" else x)
            if group.called_once:
                raise _Reached  # the rest of the block is not needed

        with (
            hooked(block, {layer: collect}),
            suppress(_Reached),
            arithmetic(place.device, place.precision),
        ):
            replay(block, batch, call)
    return accumulator.gram


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
