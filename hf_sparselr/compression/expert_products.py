"""How a module multiplies with the weights of its experts, where it does not say: seen in one forward pass."""

import re
from collections.abc import Iterable

import torch
from torch import nn

from ..data.model_inputs import Sample, first_row
from ..nn.packed_experts import WatchedStack
from .capture import model_inputs
from .experts import expert_parameters, stack_shape


@torch.no_grad()
def transposed_parameters(model: nn.Module, names: Iterable[str], batch: Sample) -> set[str]:
    """Of the parameters that hold the named layers, those whose module multiplies x W instead of x W^T.

    Most modules say which they do. Others run once on the first sample, and the products are watched.

    Raises:
        ValueError: a module uses a parameter in another way, so its experts cannot become linear layers.
    """
    wanted = {name.rpartition(".")[0] for name in names}
    unknown = {
        name: place
        for name, place in expert_parameters(model).items()
        if name in wanted and not hasattr(place[0], "is_transposed")
    }
    if not unknown:
        return set()
    watched, parameters = {}, {}
    try:
        for name, (module, key, experts) in unknown.items():
            parameters[name] = getattr(module, key)
            watched[name] = WatchedStack(parameters[name], stack_shape(parameters[name], experts))
            delattr(module, key)
            setattr(module, key, watched[name])
        model(**model_inputs(model, first_row(batch)))
    except TypeError as error:
        raise ValueError(
            f"the experts {_names(unknown)} cannot become linear layers ({error}): leave them dense with "
            f"ignore={sorted({re.escape(name) for name in unknown})}"
        ) from error
    finally:
        for name, parameter in parameters.items():
            module, key, _ = unknown[name]
            delattr(module, key)
            setattr(module, key, parameter)
    mixed = [name for name, stack in watched.items() if len(stack.uses) > 1]
    if mixed:
        raise ValueError(
            f"the experts {_names(mixed)} are multiplied from both sides: leave them dense with ignore"
        )
    return {name for name, stack in watched.items() if stack.uses == {True}}


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
