"""The factors of a compressed model as a LoRA adapter."""

import logging
import re
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..transformers.heads import heads, task_type
from .lora_layer import REPLACING
from .targets import compressed_layers, refused_by_peft

logger = logging.getLogger("hf_sparselr")

_WITHOUT_ADAPTERS = "hf_sparselr.train_mode trains them without adapters"

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


# Arguments that PEFT ignores where targets are full names.
_IGNORED = ("layers_to_transform", "layers_pattern")


def _check_targets(config: LoraConfig, model: nn.Module, intended: set[str]) -> None:
    # PEFT matches names by their ends, so a full name may also select a longer one.
    found = {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)}
    if not found & intended:
        raise ValueError("the arguments exclude every compressed layer with low-rank factors")
    if extra := sorted(found - intended):
        raise ValueError(f"PEFT would also target {', '.join(extra)}: pass exclude_modules={extra!r}")


def lora_config(model: nn.Module, **lora_kwargs: Any) -> LoraConfig:
    """A LoraConfig whose adapter is the model's low-rank factors, so that they can be trained.

    The model's outputs stay the same: to the bit in FP32, and in half precision if the adapter keeps that dtype
    (`autocast_adapter_dtype=False`, as in `as_peft_model`).

    Args:
        model: a compressed transformers model. Layers of rank 0 get no adapter, and neither do layers on which PEFT
            refuses LoRA; a warning names these.
        **lora_kwargs: other fields of LoraConfig, for example `lora_dropout`. `task_type` defaults to the model's
            task, where PEFT has a name for it. `modules_to_save` is extended by the task's heads (a classifier,
            say) and by modules that were newly initialised when the model was loaded: they train, too, and are
            saved with the adapter.

    Raises:
        ValueError: an argument that is derived from the model or has no effect, no layer with low-rank factors that
            PEFT takes, or another module whose name ends in a layer's full name.
    """
    if given := [name for name in _DERIVED if name in lora_kwargs]:
        raise ValueError(
            f"lora_config sets {', '.join(given)} itself: the adapter must have the shape and scale of the "
            "model's factors, or the start would not equal the compressed model. For a new adapter beside the "
            "factors use peft.LoraConfig."
        )
    if given := [name for name in _IGNORED if lora_kwargs.get(name) is not None]:
        raise ValueError(
            f"lora_config targets layers by their full names, where PEFT ignores {', '.join(given)}: leave layers out "
            "with exclude_modules, a list of names or a regular expression"
        )
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    ranks = _ranks(model)
    lora_kwargs.setdefault("task_type", task_type(model))
    saved = [*(lora_kwargs.pop("modules_to_save", None) or ()), *heads(model)]
    largest = max(ranks.values())
    # Without the same pattern for alpha, the layers of a smaller rank would be scaled up.
    pattern = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        init_lora_weights=cast(Any, REPLACING),
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        modules_to_save=list(dict.fromkeys(saved)) or None,
        **lora_kwargs,
    )
    _check_targets(config, model, set(ranks))
    return config


def _ranks(model: nn.Module) -> dict[str, int]:
    """{name: rank} of the layers whose factors PEFT can hold."""
    ranks = {name: layer.rank for name, layer in compressed_layers(model).items() if layer.rank}
    if not ranks and any(layer.hierarchy is not None for layer in compressed_layers(model).values()):
        raise ValueError(
            "the low-rank part of the compressed layers is hierarchical, and no pair A, B gives the same outputs: "
            "train it with hf_sparselr.train_mode, add an adapter beside it with peft.LoraConfig, or compress with "
            "low_rank='flat'"
        )
    if not ranks:
        raise ValueError("the model holds no compressed layer with low-rank factors: use peft.LoraConfig")
    refused = refused_by_peft(model, list(ranks))
    if len(refused) == len(ranks):
        raise ValueError(f"PEFT refuses LoRA on all layers with low-rank factors: {_WITHOUT_ADAPTERS}")
    if refused:
        logger.warning("PEFT refuses LoRA on %s: these factors stay as they are; %s", refused, _WITHOUT_ADAPTERS)
    return {name: rank for name, rank in ranks.items() if name not in refused}


def as_peft_model(model: nn.Module, adapter_name: str = "default", **lora_kwargs: Any) -> PeftModel:
    """The model with its low-rank factors as a trainable adapter in the model's dtype: the same outputs.

    Args:
        model: a compressed transformers model; it is changed in place.
        adapter_name: the adapter's name.
        **lora_kwargs: see `lora_config`, which also lists the errors.
    """
    config = lora_config(model, **lora_kwargs)
    return get_peft_model(model, config, adapter_name=adapter_name, autocast_adapter_dtype=False)
