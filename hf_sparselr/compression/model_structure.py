"""Where a model's transformer blocks are, and which linear layers are in them.

Nothing here names an architecture: blocks are found by structure.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..nn.pointwise import PointwiseConvolution, is_pointwise
from .linear_layers import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # no code calls them

Stacks = dict[str, dict[str, nn.Module]]  # {name of the stack: {dotted name of the block: block}}


def find_stacks(model: nn.Module) -> Stacks:
    """The stacks of blocks of a model, in order of definition.

    A stack is an nn.ModuleList or nn.Sequential whose members all hold linear layers, or convolutions with kernel 1,
    and are no bare lists themselves. Of lists inside one another, those count whose members the model marks as blocks
    (GradientCheckpointingLayer, _no_split_modules), else the outermost. Where marked lists leave layers of an outer
    list aside, the modules of these are stacks of one block. The parts of a model without any list are blocks.

    Raises:
        ValueError: the model has no linear layers.
    """
    # Not at the top: it loads transformers.quantizers, which registers our quantizer, which imports this module.
    from transformers.modeling_layers import GradientCheckpointingLayer

    block_names = set(getattr(model, "_no_split_modules", None) or ())

    def is_marked(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in block_names

    marked = {id(module) for module in model.modules() if _is_list(module) and all(map(is_marked, module))}
    stacks: Stacks = {}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, in_list: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        holds_marked = any(id(part) in marked for part in module.modules() if part is not module)
        could_be_stack = _is_list(module) and all(map(_holds_layers, module))
        if id(module) in marked or (not holds_marked and could_be_stack):
            members = {f"{name}.{key}": member for key, member in module.named_children()}
            stacks[name] = {key: member for key, member in members.items() if id(member) not in seen}
            seen.update(map(id, members.values()))
            return
        if in_list and not holds_marked and _holds_layers(module):
            stacks[name] = {name: module}
            return
        for key, child in module.named_children():
            visit(f"{name}.{key}" if name else key, child, in_list or could_be_stack)

    visit("", model, False)
    stacks = {name: blocks for name, blocks in stacks.items() if any(map(_holds_layers, blocks.values()))}
    if stacks:
        return stacks
    base, prefix = getattr(model, "base_model", model), ""
    if base is not model:
        prefix = next((name for name, part in model.named_modules() if part is base), "")
    parts = dict(_parts(prefix, base))
    if not parts:
        raise ValueError(f"{type(model).__name__} has no transformer blocks: no part of it holds linear layers")
    return {prefix: parts}


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of all stacks: {dotted name: block}."""
    return {name: block for stack in find_stacks(model).values() for name, block in stack.items()}


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0


def _parts(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children that hold linear layers, in bare containers too: (dotted name, child)."""
    for key, child in module.named_children():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(child, _CONTAINERS):
            yield from _parts(name, child)
        elif _holds_layers(child):
            yield name, child


def _holds_layers(module: nn.Module) -> bool:
    """Whether linear layers, dense or packed, are inside a module, which is none itself, and no bare container."""
    return not _is_layer(module) and not isinstance(module, _CONTAINERS) and any(map(_is_layer, module.modules()))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | PointwiseConvolution) or is_pointwise(module)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers inside the blocks: {dotted name: layer}, a layer that has several names once."""
    layers: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for block_name, block in find_blocks(model).items():
        for name, module in block.named_modules():
            if is_linear(module) and id(module) not in seen:
                seen.add(id(module))
                layers[f"{block_name}.{name}"] = module
    return layers


def shared_tensors(model: nn.Module) -> set[int]:
    """The ids of parameters and buffers that belong to several blocks, or to a block and another part of the model."""
    blocks = set(map(id, find_blocks(model).values()))
    owners: dict[int, set[int]] = {}

    def visit(module: nn.Module, block: int, path: tuple[int, ...]) -> None:
        block = id(module) if id(module) in blocks else block
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            owners.setdefault(id(tensor), set()).add(block)
        for child in module.children():
            if id(child) not in path:
                visit(child, block, (*path, id(child)))

    visit(model, 0, (id(model),))
    return {tensor for tensor, found in owners.items() if len(found) > 1}


def context_length(model: "PreTrainedModel") -> int | None:
    """The most tokens that a model can take at a time, or None where its config names no limit.

    Some models count positions from behind the index of their padding token: a table of position embeddings that has a
    padding index leaves that many rows unused.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    tokens = input_embeddings(model)
    for module in model.modules():
        is_table = isinstance(module, nn.Embedding) and module is not tokens
        if is_table and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def input_embeddings(model: "PreTrainedModel") -> nn.Module | None:
    """The embeddings of token ids, or None: some models have none, or several."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def output_layer(model: "PreTrainedModel") -> nn.Module | None:
    """The layer that makes logits, after all blocks, or None. Embeddings of tokens that make them too are none."""
    layer = model.get_output_embeddings()
    return None if isinstance(layer, nn.Embedding) else layer
