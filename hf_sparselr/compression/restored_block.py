"""A block that an earlier run finished: read from its file, and passed by the hidden states as it was then."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..config.sparselr_config import SparseLRConfig
from ..format.checkpoint import group_layers, read_headers
from ..nn.linear import packed_layers
from ..utils.modules import detached_states, named_tensors, tensor_place
from ..utils.world import World
from .activations import Workplace
from .block import BlockInputs, BlockResult, same_configs, working_copy
from .empty_layer import empty_packed_layer
from .run_folder import FinishedBlock
from .working_linear import WorkingLinear


def restore_block(
    block: nn.Module,
    stored: FinishedBlock,
    file: Path,
    inputs: BlockInputs | None,
    config: SparseLRConfig,
    world: World,
) -> BlockResult:
    """The result that `compress_block` had.

    The forward passes repeat the ones of that run, with the same values in the same modules, so the next block gets
    the same hidden states to the bit.

    Args:
        block: dense. It may be on the meta device where no target of transformer matching needs the dense stream.
        file: with the tensors of the finished block.
        inputs: None if no block after it needs hidden states.
    """
    packed = _packed_block(block, file)
    hidden, dense_hidden = [], None
    if inputs is not None:
        place = Workplace.of(block, config, world)
        calls, dense_hidden = place.keep_calls(inputs.calls), inputs.dense_hidden
        inputs.dense_hidden = None  # so that they end with this block
        if dense_hidden is not None:
            dense_hidden = place.forward(working_copy(block, place.device), place.keep(dense_hidden), calls)
        working = working_copy(packed, place.device)
        for name, layer in packed_layers(working).items():
            working.set_submodule(name, WorkingLinear.from_packed(layer))
        hidden = place.forward(working, place.keep(inputs.hidden), calls)
    return BlockResult(packed, hidden, dense_hidden, stored.row, stored.layer_rows, stored.dense)


def _packed_block(block: nn.Module, file: Path) -> nn.Module:
    """A copy of a dense block with the tensors of a file; it shares the others."""
    shared = {id(tensor): tensor for _, tensor in named_tensors(block)}
    device = next(block.parameters()).device
    packed = copy.deepcopy(block, {**same_configs(block), **detached_states(block), **shared})
    for name, parts in group_layers(read_headers([str(file)])).items():
        dense = packed.get_submodule(name)
        packed.set_submodule(name, empty_packed_layer(dense, parts, dense.weight.dtype))
    for name, tensor in load_file(file, "cpu" if device.type == "meta" else str(device)).items():
        container, key, old = tensor_place(packed, name)
        if device.type == "cpu":
            tensor = tensor.clone()  # the file will be deleted
        if not old.is_contiguous():
            tensor = torch.empty_strided(old.shape, old.stride(), dtype=tensor.dtype).copy_(tensor)
        container[key] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    return packed
