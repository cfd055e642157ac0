"""Checks before the PEFT calls that would go wrong on a compressed layer.

`integrations.patches` says where each runs. A check takes arguments of PEFT's call, under PEFT's names.
"""

import copy
from collections.abc import Iterable
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from ...nn.linear import SparseLRLinear
from .lora_layer import REPLACING, SparseLRLoraLayer, check_config, is_replacing
from .targets import compressed_layers

# Methods that run beside a layer and never ask for the values of its weight. A test proves it for
# each. All others are refused, so that a new one cannot densify, or change, a layer unnoticed.
BESIDE = tuple(
    (
        "IA3 VERA PVERA LOHA LOKR OFT BOFT ROAD BEFT FOURIERFT WAVEFT C3A VBLORA UNILORA RANDLORA GRALORA MISS LILY "
        "POLY"
    ).split()
)


def _lora_layers(model: nn.Module) -> dict[str, SparseLRLoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLRLoraLayer)}


def check_injection(
    self: BaseTuner, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Before `BaseTuner.inject_adapter`, which every adapter of every method passes; the model is still unchanged.

    Also tells PEFT which LoRA layer to put on compressed layers.

    Raises:
        ValueError: a method, initialisation or variant that needs a dense weight, `modules_to_save` or
            `target_parameters` on a compressed layer, or an adapter that replaces factors which the model lacks.
    """
    config: Any = self.peft_config[adapter_name]
    layers = compressed_layers(model)
    if not layers and not is_replacing(config):
        return
    targeted = _targeted(self, config, model, state_dict)
    if is_replacing(config) and (others := sorted(targeted - layers.keys())):
        raise ValueError(
            f"init_lora_weights={REPLACING!r} stands for the low-rank factors of a compressed model, and the model "
            f"holds no compressed layers {', '.join(others[:4])}: load the adapter on the model it was made for"
        )
    _check_modules_to_save(getattr(config, "modules_to_save", None), model)
    _check_parameters(config, layers)
    if targeted & layers.keys():
        _check_method(config)
    if config.peft_type == PeftType.LORA:
        config._custom_modules = {SparseLRLinear: SparseLRLoraLayer, **(config._custom_modules or {})}


def _targeted(tuner: BaseTuner, config: Any, model: nn.Module, state_dict: dict[str, Tensor] | None) -> set[str]:
    """Names of the modules that would get the adapter, an adapter's own ones left out."""
    modules = dict(model.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    names = [name for name in modules if name and not name.startswith(adapted)]
    if state_dict is not None:
        return {name for name in names if any(key.startswith(f"{name}.") for key in state_dict)}
    config = cast(Any, tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model)))
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = list(compressed_layers(model))
    return {name for name in names if tuner._check_target_module_exists(config, name)}


def _check_method(config: Any) -> None:
    if config.peft_type == PeftType.LORA:
        check_config(config)
    elif config.peft_type.value not in BESIDE:
        raise ValueError(
            f"peft_type={config.peft_type.value!r} reads or edits a dense base weight, which a compressed layer does "
            "not have: use LoraConfig, which also merges (into the low-rank factors), or a method that runs beside "
            f"the layer: {', '.join(BESIDE)}"
        )


def _check_modules_to_save(modules_to_save: Iterable[str] | None, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not name.endswith(tuple(modules_to_save or ())):  # as PEFT matches them
            continue
        if any(isinstance(inner, SparseLRLinear) for inner in module.modules()):
            raise ValueError(
                f"modules_to_save selects {name}, which is or holds a compressed layer: train its factors "
                "(hf_sparselr.lora_config), or the whole model without PEFT (hf_sparselr.train_mode)"
            )


def _check_parameters(config: PeftConfig, layers: dict[str, SparseLRLinear]) -> None:
    target_parameters = getattr(config, "target_parameters", None) or ()
    if target_parameters and is_replacing(config):
        raise ValueError(
            f"target_parameters={target_parameters!r} with init_lora_weights={REPLACING!r}, which starts from the "
            "factors of compressed layers: add an adapter of another peft.LoraConfig for these parameters"
        )
    for target in target_parameters:
        for name, layer in layers.items():
            parameters = ["weight", *dict(layer.named_parameters(recurse=False))]
            if any(f".{name}.{parameter}".endswith(f".{target}") for parameter in parameters):
                raise ValueError(
                    f"target_parameters={target!r} selects a parameter of {name}, a compressed layer, whose weight is "
                    "stored packed: LoRA takes the layer as a whole, so put it into target_modules"
                )


def check_weighting(self: BaseTuner, adapters: list[str], weights: list[float], combination_type: str) -> None:
    """Before `LoraModel.add_weighted_adapter`: adapters that replace factors mix only with their like."""
    kinds = {is_replacing(self.peft_config.get(name)) for name in adapters}
    if len(kinds) > 1:
        raise ValueError(
            f"add_weighted_adapter cannot mix {', '.join(adapters)}: some have init_lora_weights={REPLACING!r} "
            "and replace the layers' factors, the others add to them"
        )
    if not any(kinds):
        return
    if len(adapters) > 1 and combination_type not in ("svd", "cat"):
        raise ValueError(
            f"combination_type={combination_type!r} averages or prunes single entries, which would distort the "
            "model's own factors that replacing adapters hold: use 'svd' or 'cat'"
        )
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"weights={weights}: those of replacing adapters must sum to 1, as each adapter holds the model's own "
            "factors once"
        )
    for name, layer in _lora_layers(self).items():
        lacking = [adapter for adapter in adapters if adapter not in layer.replacing]
        if 0 < len(lacking) < len(adapters):
            raise ValueError(
                f"add_weighted_adapter: {', '.join(lacking)} has no factors for {name}, and zeros would take the place "
                "of the model's own: weight replacing adapters of the same layers"
            )


def _check_same_kind(adapter_name: str, replacing: bool, config: PeftConfig) -> None:
    if replacing != is_replacing(config):
        raise ValueError(
            f"cannot hot-swap {adapter_name}: of the adapters in place and to come, one replaces the model's "
            "factors and the other adds to them. Load the new one under another name."
        )


def check_hotswap(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: LoraConfig) -> None:
    """Before `hotswap_adapter_from_state_dict`: both adapters must be of one kind and hold the same factors."""
    for name, layer in _lora_layers(model).items():
        name = name.removeprefix("_orig_mod.")
        if adapter_name not in layer.lora_A:
            continue
        replacing = adapter_name in layer.replacing
        _check_same_kind(adapter_name, replacing, config)
        if replacing and f"{name}.lora_A.{adapter_name}.weight" not in state_dict:
            raise ValueError(
                f"cannot hot-swap {adapter_name}: the new adapter has no factors for {name}, and zeros would take the "
                "place of the model's own"
            )


def check_reload(
    self: nn.Module,
    peft_model_id: str | None,
    adapter_name: str | None,
    peft_config: PeftConfig | None,
    adapter_kwargs: dict[str, Any] | None = None,
) -> None:
    """Before transformers' `load_adapter`, which under a name in use swaps adapters without looking at configs."""
    name = adapter_name or "default"
    present = getattr(self, "peft_config", {}).get(name)
    if present is not None and compressed_layers(self):
        config = peft_config or PeftConfig.from_pretrained(str(peft_model_id), **(adapter_kwargs or {}))
        _check_same_kind(name, is_replacing(present), config)


def check_intruders(peft_model: nn.Module, old_adapter_name: str) -> None:
    """Before `reduce_intruder_dimension`, which needs the weight that an adapter adds to."""
    if any(old_adapter_name in layer.replacing for layer in _lora_layers(peft_model).values()):
        raise ValueError(
            f"reduce_intruder_dimension compares an adapter with the weight it adds to, but {old_adapter_name} "
            "replaces the model's factors: use an additive adapter"
        )


def check_experts(self: Any) -> None:
    """Before X-LoRA starts, which adds the outputs of its experts."""
    if any(layer.replacing for layer in _lora_layers(self.lora_model).values()):
        raise ValueError(
            "X-LoRA adds its experts to each layer, but some of these replace the model's low-rank factors: use "
            "additive adapters as experts"
        )
