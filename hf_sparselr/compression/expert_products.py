"""How modules multiply with the weights of their experts, where they do not say: seen in a forward pass."""

from collections.abc import Iterable

import torch
from torch import nn

from ..data.model_inputs import Sample, first_row
from ..nn.packed_experts import WatchedStack
from ..utils.modules import eval_mode
from .capture import computing_in_fp32, halves_outside, in_fp32, model_inputs
from .experts import expert_parameters, stack_shape
from .model_structure import find_blocks

Places = dict[str, tuple[nn.Module, str, int]]


@torch.no_grad()
def watch_experts(model: nn.Module, names: Iterable[str], batch: Sample) -> tuple[set[str], set[str]]:
    """Looks for the products of modules that do not say whether they hold weights as (out, in) or (in, out).

    Args:
        names: of the layers to compress.
        batch: the model runs on its first sample.

    Returns:
        The parameters that hold weights as (in, out), and those that are not used in products x W of single experts.
    """
    kinds: dict[tuple, Places] = {}
    parameters = expert_parameters(model)
    for name in unknown_products(model, names):
        module, key, _ = parameters[name]
        kinds.setdefault((type(module), key), {})[name] = parameters[name]
    transposed, unusable = set(), set()
    for places in kinds.values():
        uses = _watch(model, places, batch)
        for name in places:
            if uses is None or len(uses[name]) > 1:
                unusable.add(name)
            elif uses[name] == {True}:
                transposed.add(name)
    return transposed, unusable


def unknown_products(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The parameters with some of the named layers, in modules that do not say if they hold (out, in) or (in, out)."""
    wanted = {name.rpartition(".")[0] for name in names}
    places = expert_parameters(model).items()
    return [name for name, (module, *_) in places if name in wanted and not hasattr(module, "is_transposed")]


def _watch(model: nn.Module, places: Places, batch: Sample) -> dict[str, set[bool]] | None:
    """The uses of parameters in a forward pass; None if the pass fails because they are no tensors."""
    watched, parameters = {}, {}
    blocks = find_blocks(model)
    try:
        for name, (module, key, experts) in places.items():
            parameters[name] = getattr(module, key)
            watched[name] = WatchedStack(parameters[name], stack_shape(parameters[name], experts))
            delattr(module, key)
            setattr(module, key, watched[name])
        with (
            eval_mode(model),
            in_fp32(halves_outside(model, blocks)),
            computing_in_fp32(list(blocks.values())),
        ):
            model(**model_inputs(model, first_row(batch)))
    except (TypeError, AttributeError):
        return None
    finally:
        for name, parameter in parameters.items():
            module, key, _ = places[name]
            if key in vars(module):
                delattr(module, key)
            setattr(module, key, parameter)
    return {name: stack.uses for name, stack in watched.items()}
