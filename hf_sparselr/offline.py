"""`hf_sparselr.compress`: compress a model in memory or by name, and write the packed checkpoint."""

import logging
import math
import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from . import calibration as sources
from .blocks import find_stacks, plan_layers
from .config import CUSTOM, SparseLRConfig
from .distill import distill, on_device, shadow
from .given import Given
from .integrations.transformers import attach
from .pipeline import InMemory, make_batches, run
from .report import Report
from .timing import Phases
from .worker import work_device

logger = logging.getLogger("hf_sparselr")

SAMPLE_BATCH = 256  # windows that the dense model writes at a time


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
        windows, model = load_dense(name, config, load_kwargs)
        keep = False
    compress_in_memory(model, config, windows, keep)
    if output_dir is not None:
        save(model, output_dir, name, config.tokenizer)
    return model


def load_dense(name: str, config: SparseLRConfig, load_kwargs: dict) -> tuple[list[torch.Tensor] | None, Any]:
    """Checks plan and calibration on a skeleton without weights, then reads the weights."""
    cls, skeleton = dense_skeleton(name, load_kwargs)
    plan_layers(skeleton, config)
    windows = load_calibration(skeleton, config, name)
    return windows, cls.from_pretrained(name, **load_kwargs)


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


def sample_windows(model: PreTrainedModel, config: SparseLRConfig) -> list[torch.Tensor]:
    """Calibration windows that a dense model writes itself."""
    return sources.sample_from_model(
        model,
        config.tokenizer or _tokenizer(model.config.name_or_path),
        num_samples=config.num_samples,
        seq_len=_seq_len(model, config),
        seed=config.seed,
    )


def compress_in_memory(
    model: PreTrainedModel,
    config: SparseLRConfig,
    windows: list[torch.Tensor] | None,
    keep_dense: bool,
    given: Given | None = None,
) -> PreTrainedModel:
    """Runs the pipeline on a loaded model and turns it into a packed one.

    Args:
        windows: calibration windows; None samples them from the model.
        keep_dense: hold the dense blocks until the run succeeded, to put them back if it fails.
        given: decompositions to refine instead of solving.
    """
    if given is None:
        plan_layers(model, config)
    if windows is None:
        windows = sample_windows(model, config)
    dense_bytes = _bytes(model)
    base = given.reference if given else model
    teacher = None
    if "distill" in config.refine_steps:  # of a model that is replaced block by block, a copy
        teacher = given.reference if given else shadow(model, find_stacks(model))
    sink = InMemory(keep_dense)
    try:
        report = run(model, config, windows, sink, given)
        if teacher is not None:
            distill_in_memory(model, teacher, config, windows, report)
    except BaseException:
        sink.undo()
        raise
    report.base_model = base.config.name_or_path or None
    report.sizes = {"dense": dense_bytes, "packed": _bytes(model)}
    return attach(model, config.stored(), report)


def distill_in_memory(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    config: SparseLRConfig,
    windows: list[torch.Tensor],
    report: Report,
) -> None:
    """Distils a packed model from the dense one on the calibration windows and on text that the dense one writes."""
    options = config.distill
    device = work_device(config.device, model.device)
    phases = Phases(device)
    with phases("distillation"), on_device(teacher, device, options):
        if options.self_samples:
            tokenizer = config.tokenizer or _tokenizer(teacher.config.name_or_path)
            windows = windows + sources.sample_from_model(
                teacher,
                tokenizer,
                num_samples=options.self_samples,
                seq_len=_bounded(options.self_len, model),
                seed=config.seed + 1,
                batch_size=SAMPLE_BATCH,
            )
        size = math.gcd(config.batch_size, options.batch_size)
        bar = transformers_logging.tqdm(total=options.passes, desc="Distilling", unit="pass")

        def on_pass(loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")

        batches = make_batches(windows, size)
        report.distill = distill(model, teacher, batches, options, config.seed, device, on_pass)
        bar.close()
    report.seconds += phases.seconds["distillation"]
    report.peak_memory = max(report.peak_memory or 0, *phases.peaks.values(), 0) or None
    logger.info(
        f"distillation took the divergence from the dense model from {report.distill['loss_before']:.4f} to "
        f"{report.distill['loss_after']:.4f} nats a token in {report.distill['seconds']:.1f} s"
    )


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
    return _bounded(config.seq_len, model)


def _bounded(length: int, model: PreTrainedModel) -> int:
    """A window's length, bounded by the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(length, limit) if limit else length


def _bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers as they are stored, tied ones once."""
    seen = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
