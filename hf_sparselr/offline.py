"""`hf_sparselr.compress`: compress a model in memory or by name, and write the packed checkpoint."""

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel

from . import calibration as sources
from .blocks import plan_layers
from .config import CUSTOM, SparseLRConfig
from .integrations.transformers import attach
from .pipeline import InMemory, run


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
        windows = load_calibration(model, config, name)
        keep = True
    else:
        windows, model = _load_dense(name, config, load_kwargs)
        keep = False
    compress_in_memory(model, config, windows, keep)
    if output_dir is not None:
        save(model, output_dir, name, config.tokenizer)
    return model


def _load_dense(
    name: str, config: SparseLRConfig, load_kwargs: dict
) -> tuple[list[torch.Tensor] | None, Any]:
    """Checks plan and calibration on a skeleton without weights, then reads the weights."""
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
        skeleton = cls(model_config) if hasattr(cls, "base_model_prefix") else cls.from_config(model_config)
    plan_layers(skeleton, config)
    windows = load_calibration(skeleton, config, name)
    return windows, cls.from_pretrained(name, **load_kwargs)


def load_calibration(model: PreTrainedModel, config: SparseLRConfig, name: str) -> list[torch.Tensor] | None:
    """Token windows for a model, which may still be on the meta device; None for "self".

    Raises:
        ValueError, OSError: see `calibration.load_windows`.
    """
    if isinstance(config.calibration, str) and config.calibration == CUSTOM:
        raise ValueError(
            f"calibration={CUSTOM!r} stands for data that were not stored with the config: pass the data again"
        )
    if isinstance(config.calibration, str) and config.calibration == "self":
        return None
    return sources.load_windows(
        config.calibration,
        config.tokenizer or _tokenizer(name),
        num_samples=config.num_samples,
        seq_len=_seq_len(model, config),
        seed=config.seed,
        vocab_size=model.config.get_text_config().vocab_size,
    )


def compress_in_memory(
    model: PreTrainedModel, config: SparseLRConfig, windows: list[torch.Tensor] | None, keep_dense: bool
) -> PreTrainedModel:
    """Runs the pipeline on a loaded model and turns it into a packed one.

    Args:
        windows: calibration windows; None samples them from the model.
        keep_dense: hold the dense blocks until the run succeeded, to put them back if it fails.
    """
    plan_layers(model, config)
    if windows is None:
        windows = sources.sample_from_model(
            model,
            config.tokenizer or _tokenizer(model.config.name_or_path),
            num_samples=config.num_samples,
            seq_len=_seq_len(model, config),
            seed=config.seed,
        )
    dense_bytes = _bytes(model)
    sink = InMemory(keep_dense)
    try:
        report = run(model, config, windows, sink)
    except BaseException:
        sink.undo()
        raise
    report.base_model = model.config.name_or_path or None
    report.sizes = {"dense": dense_bytes, "packed": _bytes(model)}
    return attach(model, config.stored(), report)


def save(model: PreTrainedModel, output_dir: str | os.PathLike, name: str, tokenizer: Any = None) -> None:
    """Writes the packed checkpoint and what belongs to it: tokenizer or processor, chat template, report, card."""
    model.save_pretrained(output_dir)
    for loader in (AutoProcessor, AutoTokenizer):
        try:
            (tokenizer or loader.from_pretrained(name)).save_pretrained(output_dir)
            return
        except (OSError, ValueError, KeyError):
            continue  # a model without a processor, or without a tokenizer, is a model all the same


def _tokenizer(name: str) -> Any:
    """The tokenizer beside a model, or None: then sources that need one say so."""
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def _seq_len(model: PreTrainedModel, config: SparseLRConfig) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(config.seq_len, limit) if limit else config.seq_len


def _bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers as they are stored, tied ones once."""
    seen = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
