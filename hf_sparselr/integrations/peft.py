"""PEFT on compressed models: our LoRA layer for every LoraConfig, and the existing factors as an adapter."""

import functools
import re
from collections.abc import Callable

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..modules import SparseLRLinear
from .lora_layer import REPLACING, SparseLRLoraLayer, check_config, is_replacing

# Arguments that lora_config derives from the compressed layers.
_DERIVED = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
)


def _compressed_layers(model: nn.Module) -> dict[str, SparseLRLinear]:
    """By the name under which PEFT targets them, with or without a LoRA layer around."""
    modules = model.named_modules()
    return {name.removesuffix(".base_layer"): m for name, m in modules if isinstance(m, SparseLRLinear)}


def _register_layer(tuner: LoraModel, config: LoraConfig, model: nn.Module) -> None:
    """Checks the config and puts our layer class into it, before PEFT replaces the first module."""
    target = config.target_modules
    everything = isinstance(target, str) and target.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    layers = _compressed_layers(model)
    if any(everything or tuner._check_target_module_exists(config, name) for name in layers):
        check_config(config)
    config._custom_modules = {SparseLRLinear: SparseLRLoraLayer, **(config._custom_modules or {})}


def _check_same_kind(tuner: LoraModel, adapters: list[str], **_) -> None:
    kinds = {is_replacing(tuner.peft_config.get(name)) for name in adapters}
    if len(kinds) > 1:
        raise ValueError(
            f"add_weighted_adapter cannot mix {', '.join(adapters)}: some have init_lora_weights={REPLACING!r} "
            "and replace the layers' factors, the others add to them"
        )


def _run_before(name: str, check: Callable) -> None:
    method = getattr(LoraModel, name)
    if getattr(method, "_sparselr", False):
        return

    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        check(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    checked._sparselr = True
    setattr(LoraModel, name, checked)


# Every injection of every LoraConfig passes through _prepare_model with the model still unchanged, so one
# wrapped method both dispatches our layer through PEFT's own custom-module mechanism and refuses a config in
# time. LoraConfig.__post_init__ does not see the model; _create_new_module runs after other layers were replaced.
_run_before("_prepare_model", _register_layer)
_run_before("_check_add_weighted_adapter", _check_same_kind)


def _check_targets(config: LoraConfig, model: nn.Module, intended: set[str]) -> None:
    # PEFT matches names by their ends, so a full name may also select a longer one.
    found = {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)}
    if not found & intended:
        raise ValueError("the arguments exclude every compressed layer with low-rank factors")
    if extra := sorted(found - intended):
        raise ValueError(f"PEFT would also target {', '.join(extra)}: pass exclude_modules={extra!r}")


def lora_config(model: nn.Module, **lora_kwargs) -> LoraConfig:
    """A LoraConfig under which the model's low-rank factors are the adapter, so that they can be trained.

    The model's output does not change: to the bit in FP32, and in half precision if the adapter keeps that
    dtype (`autocast_adapter_dtype=False`, as in `as_peft_model`).

    Args:
        model: a compressed transformers model. Layers of rank 0 get no adapter.
        **lora_kwargs: other fields of LoraConfig, for example `lora_dropout`. `task_type` defaults to what the
            model generates.

    Raises:
        ValueError: an argument that is derived from the model, no layer with low-rank factors, or another
            module whose name ends in a layer's full name.
    """
    if given := [name for name in _DERIVED if name in lora_kwargs]:
        raise ValueError(
            f"lora_config sets {', '.join(given)} itself: the adapter must have the shape and scale of the "
            "model's factors, or the start would not equal the compressed model. For a new adapter beside the "
            "factors use peft.LoraConfig."
        )
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    ranks = {name: layer.rank for name, layer in _compressed_layers(model).items() if layer.rank}
    if not ranks:
        raise ValueError("the model holds no compressed layer with low-rank factors: use peft.LoraConfig")
    if hasattr(model, "can_generate") and model.can_generate():
        encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        lora_kwargs.setdefault("task_type", "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM")
    largest = max(ranks.values())
    # Without the same pattern for alpha, the layers of a smaller rank would be scaled up.
    pattern = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        init_lora_weights=REPLACING,
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        **lora_kwargs,
    )
    _check_targets(config, model, set(ranks))
    return config


def as_peft_model(model: nn.Module, adapter_name: str = "default", **lora_kwargs) -> PeftModel:
    """The model with its low-rank factors as a trainable adapter in the model's dtype: the same outputs.

    Args:
        model: a compressed transformers model; it is changed in place.
        adapter_name: the adapter's name.
        **lora_kwargs: see `lora_config`, which also lists the errors.
    """
    config = lora_config(model, **lora_kwargs)
    return get_peft_model(model, config, adapter_name=adapter_name, autocast_adapter_dtype=False)
