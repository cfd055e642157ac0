"""Find a model's transformer blocks, choose their layers, record how each block is called, replay one.

Nothing here names an architecture: blocks are found by structure, their arguments come from a real call.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    pass


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost module lists that hold transformer blocks: {dotted name: list}, in order of definition.

    Raises:
        ValueError: the model has none.
    """
    # Importing this loads transformers.quantizers, which imports our quantizer, which imports this module.
    from transformers.modeling_layers import GradientCheckpointingLayer

    block_names = set(getattr(model, "_no_split_modules", None) or ())

    def is_block(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in block_names

    stacks = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(is_block, module)):
            stacks[name] = module
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks: expected an nn.ModuleList whose members are "
            "GradientCheckpointingLayer or named in _no_split_modules"
        )
    return stacks


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers inside the blocks: {dotted name: nn.Linear or Conv1D}."""
    return {
        f"{stack}.{name}": module
        for stack, blocks in find_stacks(model).items()
        for name, module in blocks.named_modules()
        if type(module) in (nn.Linear, Conv1D)
    }


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; a Conv1D stores (in, out)."""
    shape = tuple(layer.weight.shape)
    return shape[::-1] if isinstance(layer, Conv1D) else shape


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, (out, in); a view, without gradient."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight
