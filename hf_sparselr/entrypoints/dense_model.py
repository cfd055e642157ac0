"""Dense models by name: everything that can be checked without their weights comes before the weights."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..data.origin import Origin


def dense_skeleton(origin: Origin, dtype: str | torch.dtype = "auto") -> tuple[Any, PreTrainedModel]:
    """The class that loads a dense model, and the model without weights.

    Args:
        dtype: as for `from_pretrained`.

    Raises:
        ValueError: the model is quantised already.
    """
    config = AutoConfig.from_pretrained(origin.name, **origin.arguments)
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config.get("quant_method")
        raise ValueError(f"model={origin.name!r} is already quantised ({method}): compress the original dense model")
    cls = _model_class(config)
    with torch.device("meta"):
        if hasattr(cls, "base_model_prefix"):
            model = cls(config)
        else:
            trusted = {key: origin.arguments[key] for key in ("trust_remote_code",) if key in origin.arguments}
            model = cls.from_config(config, **trusted)
    return cls, model.to(_resolved(dtype, config))


def _resolved(dtype: str | torch.dtype, config: PretrainedConfig) -> torch.dtype:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _model_class(config: PretrainedConfig) -> Any:
    """The class that the config names, in transformers or, for code beside the checkpoint, an Auto class."""
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    if cls := getattr(transformers, architecture, None):
        return cls
    for auto, reference in (getattr(config, "auto_map", None) or {}).items():
        if str(reference).rpartition(".")[2] == architecture and hasattr(transformers, auto):
            return getattr(transformers, auto)
    return transformers.AutoModelForCausalLM
