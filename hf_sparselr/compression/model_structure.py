"""Where a model's transformer blocks are, and which linear layers are in them.

Nothing here names an architecture: blocks are found by structure.
"""

from typing import TYPE_CHECKING

from torch import nn

from .linear_layers import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost module lists that hold transformer blocks: {dotted name: list}, in order of definition.

    Raises:
        ValueError: the model has none.
    """
    # Not at the top: it loads transformers.quantizers, which registers our quantizer, which imports this module.
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
    """All linear layers inside the blocks: {dotted name: layer}."""
    return {
        f"{stack}.{name}": module
        for stack, blocks in find_stacks(model).items()
        for name, module in blocks.named_modules()
        if is_linear(module)
    }


def context_length(model: "PreTrainedModel") -> int | None:
    """The most tokens that a model can take at a time, or None where its config names no limit.

    Some models count positions from behind the index of their padding token: a table of position embeddings that has a
    padding index leaves that many rows unused.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    for module in model.modules() if limit else ():
        is_table = isinstance(module, nn.Embedding) and module is not tokens
        if is_table and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit
