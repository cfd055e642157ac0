"""`hf_sparselr.compress`: compress a model in memory or by name, and write the packed checkpoint."""

import os
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel

from ..compression.plan import Layer, plan_layers
from ..compression.run import compress_in_memory, load_calibration
from ..config.sparselr_config import SparseLRConfig
from ..integrations.transformers.quantizer import attach
from ..utils.modules import restored_on_error


def compress(
    model: str | os.PathLike | PreTrainedModel,
    config: SparseLRConfig,
    output_dir: str | os.PathLike | None = None,
    **load_kwargs: Any,
) -> PreTrainedModel:
    """Compresses a model; the same as `from_pretrained(..., quantization_config=config)`, offline.

    Everything that can be wrong with the config, the layers and the calibration data is found before weights are
    read. A model given as an object is changed in place, and left as it was if the run fails.

    Args:
        model: a Hub name, a directory, or a dense model in memory (CPU or GPU; blocks are worked on one at a time
            on `config.device`).
        output_dir: where to write the packed checkpoint, with tokenizer or processor, chat template, generation
            config, report and model card.
        load_kwargs: for `from_pretrained` (dtype, revision, ...), when `model` is a name.

    Returns:
        The compressed model; `model.sparselr_report` tells what was done.

    Raises:
        TypeError, ValueError, OSError: naming the field, layer or data set, and what is allowed.
    """
    if not isinstance(config, SparseLRConfig):
        raise TypeError(f"config={config!r}: expected a hf_sparselr.SparseLRConfig")
    name = model.config.name_or_path if isinstance(model, PreTrainedModel) else os.fspath(model)
    if isinstance(model, PreTrainedModel):
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(
                f"model={name!r} is already quantised ({model.hf_quantizer.quantization_config.quant_method})"
            )
        plan = plan_layers(model, config)
        windows = load_calibration(model, config, name)
        undo = restored_on_error(model, model.config)
    else:
        plan, windows, model = load_dense(name, config, load_kwargs)
        undo = nullcontext()  # nobody else has the model
    with undo:
        attach(model, config.stored(), compress_in_memory(model, plan, config, windows))
    if output_dir is not None:
        save(model, output_dir, name, config.tokenizer)
    return model


def load_dense(
    name: str, config: SparseLRConfig, load_kwargs: dict
) -> tuple[dict[str, Layer], list[torch.Tensor] | None, Any]:
    """(plan, calibration windows, model). The first two need a skeleton only, and are made before weights are read."""
    cls, skeleton = dense_skeleton(name, load_kwargs)
    plan = plan_layers(skeleton, config)
    windows = load_calibration(skeleton, config, name)
    return plan, windows, cls.from_pretrained(name, **load_kwargs)


def dense_skeleton(name: str, load_kwargs: dict) -> tuple[Any, Any]:
    """The class that loads a dense model by name, and the model without weights."""
    where = {
        key: load_kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in load_kwargs
    }
    model_config = AutoConfig.from_pretrained(name, **where)
    if getattr(model_config, "quantization_config", None) is not None:
        method = model_config.quantization_config.get("quant_method")
        raise ValueError(f"model={name!r} is already quantised ({method}): compress the original dense model")
    cls = getattr(transformers, (model_config.architectures or ["AutoModelForCausalLM"])[0], None)
    cls = cls or transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return cls, cls(model_config) if hasattr(cls, "base_model_prefix") else cls.from_config(model_config)


def save(model: PreTrainedModel, output_dir: str | os.PathLike, name: str, tokenizer: Any = None) -> None:
    """Writes the packed checkpoint and what belongs to it: tokenizer or processor, chat template, report, card."""
    model.save_pretrained(output_dir)
    for loader in (AutoProcessor, AutoTokenizer):
        try:
            (tokenizer or loader.from_pretrained(name)).save_pretrained(output_dir)
            return
        except (OSError, ValueError, KeyError):
            continue  # a model without a processor, or without a tokenizer, is a model all the same
