"""Chooses which parameters of a compressed model train."""

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..integrations.peft.lora_layer import SparseLRLoraLayer
from ..integrations.transformers.heads import heads
from ..integrations.transformers.sharding import check_sharding
from ..nn.linear import SparseLRLinear
from ..utils.validation import check_choice

MODES = ("factors", "factors+norms", "full")


def train_mode(model: nn.Module, mode: str = "factors") -> nn.Module:
    """Sets `requires_grad` of every parameter, and lets Trainer take the model without adapters.

    S keeps its support in every mode. `values` holds only the kept entries: their gradient is the dense one projected
    on the support, and the optimizer's state is as long as they are. The packed mask never trains. The model saves
    and reloads packed as before.

    An optimizer rounds every step to the parameters' dtype. For "full", load the model with `dtype=torch.float32`
    (BF16 autocast on top is fine), or use an optimizer that keeps an FP32 copy.

    Args:
        model: a compressed model, changed in place. Around one with adapters, only "factors" is possible.
        mode: "factors": A and B of all compressed layers (of a hierarchical low-rank part its factors and leaves),
            or, on a PEFT model, the active adapters that replace them (see `lora_config`). "factors+norms": also all
            parameters with one dimension: norms and biases.
            Both also train the task's heads and the modules that were newly initialised when the model was loaded; on
            a PEFT model, those of them that the adapter saves. "full": all floating-point parameters, the nonzeros of S
            among them.

    Returns:
        The model.

    Raises:
        ValueError: an unknown mode, nothing that it selects, a mode that adapter files could not store, or a way
            of sharding set up in this process that packed layers cannot follow (FSDP1, FSDP2 before torch 2.12,
            DeepSpeed ZeRO-3).
    """
    check_choice("mode", mode, MODES)
    check_sharding()
    adapted = isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules())
    chosen = _adapter_factors(model, mode) if adapted else _own_parameters(model, mode)
    if not chosen:
        raise ValueError(
            f"mode={mode!r} selects no parameter: the compressed layers have rank 0, or no active adapter replaces "
            "their factors (hf_sparselr.lora_config makes one that does; additive adapters need no train_mode)"
        )
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not adapted:
        quantizer.is_qat_trainable = True
    return model


def _own_parameters(model: nn.Module, mode: str) -> list[nn.Parameter]:
    layers = [module for module in model.modules() if isinstance(module, SparseLRLinear)]
    if not layers:
        raise ValueError("the model holds no compressed layer")
    floats = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if mode == "full":
        return floats
    factors = [factor for layer in layers for factor in layer.factors]
    if not factors:
        return []
    whole = [p for head in heads(model).values() for p in head.parameters() if p.is_floating_point()]
    if mode == "factors":
        return factors + whole
    values = {id(layer.values) for layer in layers}
    return factors + whole + [p for p in floats if p.ndim == 1 and id(p) not in values]


def _adapter_factors(model: nn.Module, mode: str) -> list[nn.Parameter]:
    if mode != "factors":
        raise ValueError(
            f"mode={mode!r} on a model with adapters: adapter files hold the adapters alone, so the rest would be "
            "lost on saving. Train the compressed model itself (peft_model.unload(), or merge_and_unload())"
        )
    layers = [module for module in model.modules() if isinstance(module, SparseLRLoraLayer)]
    pairs = [(layer, name) for layer in layers for name in layer.active_adapters if name in layer.replacing]
    if not pairs:
        return []
    factors = [p for layer, name in pairs for module in layer.pair(name) for p in module.parameters()]
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    active = [(wrapper.modules_to_save, name) for wrapper in wrappers for name in wrapper.active_adapters]
    copies = [modules[name] for modules, name in active if name in modules]
    return factors + [p for copy in copies for p in copy.parameters() if p.is_floating_point()]
