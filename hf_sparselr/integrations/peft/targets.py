"""Which modules the names in a LoRA config select."""

import re
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraModel
from torch import nn

from ...nn.linear import SparseLRLinear
from ...nn.packed_experts import ExpertStack
from .lora_layer import is_replacing


def compressed_layers(model: nn.Module) -> dict[str, SparseLRLinear]:
    """{name under which PEFT targets a layer: layer}, with or without adapters around it."""
    modules = model.named_modules()
    return {re.sub(r"(\.base_layer)+$", "", name): m for name, m in modules if isinstance(m, SparseLRLinear)}


def refused_by_peft(model: nn.Module, names: list[str]) -> list[str]:
    """The layers that PEFT refuses to put LoRA on, because their weight is read instead of called."""
    check = getattr(LoraModel, "_check_target_module_compatiblity", None)
    if check is None:
        return []
    config, refused = LoraConfig(), []
    for name in names:
        try:
            check(None, config, model, name.rpartition(".")[2])
        except ValueError:
            refused.append(name)
    return refused


def convert_config(call: Callable[[], None], peft_config: Any, model: nn.Module) -> None:
    """Around PEFT's `convert_peft_config_for_transformers`, which turns names of modules into those of experts.

    PEFT takes every name that ends in, say, "down_proj" for the experts of a model whose experts transformers keeps
    as 3-D parameters. Here a name that selects compressed layers goes on selecting them. Only a bare name, as
    "down_proj", selects experts as well.
    """
    if is_replacing(peft_config):
        return
    if peft_config.peft_type != PeftType.LORA:
        call()
        return
    targets, layers = getattr(peft_config, "target_modules", None), compressed_layers(model)
    if not layers or not targets or isinstance(targets, str):
        call()
        return
    selecting = {target for target in targets if any(f".{name}".endswith(f".{target}") for name in layers)}
    before = set(peft_config.target_parameters or ())
    peft_config.target_modules = set(targets) - {target for target in selecting if "." in target}
    try:
        call()
    finally:
        peft_config.target_modules = set(peft_config.target_modules) | selecting
    parameters = [name for name, _ in model.named_parameters()]
    converted = {p for p in peft_config.target_parameters or () if p not in before}
    stays = {p for p in converted if _ends_one(p, parameters)}
    peft_config.target_parameters = (before | stays) or None
    peft_config.target_modules = _without_stacks(model, peft_config.target_modules, converted - stays)


def _without_stacks(model: nn.Module, targets: set[str], converted: set[str]) -> set[str]:
    """Targets in which packed experts, which PEFT cannot hold as a whole, are replaced by their layers.

    Args:
        targets: names of modules, or their ends.
        converted: ends that PEFT takes for parameters of experts.
    """
    modules = dict(model.named_modules())
    stacks = [name for name, module in modules.items() if isinstance(module, ExpertStack)]
    chosen = [name for name in stacks if any(_ends_one(end, [name]) for end in targets | converted)]
    ends = {end for end in targets if _ends_one(end, chosen)}
    others = {name for name in modules if name not in stacks and any(_ends_one(end, [name]) for end in ends)}
    layers = {name for name in modules if name.rpartition(".")[0] in chosen}
    return (targets - ends) | others | layers


def _ends_one(end: str, names: list[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for name in names)
