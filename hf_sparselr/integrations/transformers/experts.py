"""Experts of a packed checkpoint: the skeleton gets stacks of 2-D layers where the files hold them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...compression.experts import compressible_layers, expert_parameters, stack_shape, unfuse_experts
from ...format.checkpoint import Entry, group_layers
from .names import StoredNames

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unfuse_packed_experts(model: "PreTrainedModel", entries: Mapping[str, Entry]) -> None:
    """Puts an `ExpertStack` in the place of every parameter some of whose experts are packed in the files.

    Args:
        model: a skeleton.
        entries: all tensors of the checkpoint.
    """
    parameters = expert_parameters(model)
    if not parameters:
        return
    stored = group_layers(entries)
    layers = compressible_layers(model)
    tensors = {*model.state_dict(), *(f"{name}.weight" for name in layers)}
    names = StoredNames(model, tensors, entries, stored)
    packed = {names.layer(layer): parts for layer, parts in stored.items()}
    transposed = set()
    for name, parts in packed.items():
        parameter = name.rpartition(".")[0]
        if parameter in parameters and parts["mask"].shape:
            module, key, experts = parameters[parameter]
            if parts["mask"].shape[0] != stack_shape(getattr(module, key), experts)[1]:
                transposed.add(parameter)
    unfuse_experts(model, packed, transposed)
    for parameter in {name.rpartition(".")[0] for name in packed} & parameters.keys():
        parameters[parameter][0]._is_hf_initialized = True  # transformers would draw weights for its 3-D parameters
