"""Compress a model in memory: calibration, the block loop, distillation."""

import logging
import math
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..config.sparselr_config import SparseLRConfig
from ..data import calibration as sources
from ..data.self_generation import sample_from_model
from ..utils.phase_timer import PhaseTimer
from .activations import work_device
from .distillation import copy_sharing_blocks, distill, on_device, takes_batches
from .model_structure import context_length, find_stacks
from .pipeline import make_batches, replace_in, run
from .plan import Layer
from .precomputed import Precomputed
from .report import Report

logger = logging.getLogger("hf_sparselr")


SAMPLE_BATCH = 256  # windows that the dense model writes at a time


def load_calibration(model: PreTrainedModel, config: SparseLRConfig, name: str) -> list[torch.Tensor] | None:
    """Token windows for a model, which may still be on the meta device. None for "self": those need the weights.

    Raises:
        ValueError, OSError: see `calibration.load_windows`.
    """
    if isinstance(config.calibration, str) and config.calibration == sources.CUSTOM:
        raise ValueError(
            f"calibration={sources.CUSTOM!r} stands for data that were not stored with the config: pass the data again"
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
    return sample_from_model(
        model,
        config.tokenizer or _tokenizer(model.config.name_or_path),
        num_samples=config.num_samples,
        seq_len=_seq_len(model, config),
        seed=config.seed,
    )


def compress_in_memory(
    model: PreTrainedModel,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    windows: list[torch.Tensor] | None,
    precomputed: Precomputed | None = None,
) -> Report:
    """Turns a loaded model into a packed one. The caller attaches the report, and undoes errors.

    Args:
        plan: the layers to compress, from `plan_layers`.
        windows: calibration windows; None samples them from the model.
        precomputed: decompositions to refine instead of solving.
    """
    if windows is None:
        windows = sample_windows(model, config)
    dense_bytes = _bytes(model)
    base = precomputed.reference if precomputed else model
    teacher = None
    if "distill" in config.refine_steps:  # the model is replaced block by block, so its teacher is a copy
        teacher = precomputed.reference if precomputed else copy_sharing_blocks(model, find_stacks(model))
    report = run(model, plan, config, windows, replace_in(model), precomputed)
    if teacher is not None:
        distill_in_memory(model, teacher, config, windows, report)
    report.base_model = base.config.name_or_path or None
    report.sizes = {"dense": dense_bytes, "packed": _bytes(model)}
    return report


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
    phases = PhaseTimer(device)
    with phases("distillation"), on_device(teacher, device, options):
        if options.self_samples:
            tokenizer = config.tokenizer or _tokenizer(teacher.config.name_or_path)
            windows = windows + sample_from_model(
                teacher,
                tokenizer,
                num_samples=options.self_samples,
                seq_len=_bounded(options.self_len, model),
                seed=config.seed + 1,
                batch_size=SAMPLE_BATCH,
            )
        size = math.gcd(config.batch_size, options.batch_size) if takes_batches(teacher, windows[0]) else 1
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
        f"{report.distill['loss_after']:.4f} nats a prediction in {report.distill['seconds']:.1f} s"
    )


def _tokenizer(name: str) -> Any:
    """The tokenizer beside a model, or None. A source that needs one raises an error of its own."""
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
    limit = context_length(model)
    return min(length, limit) if limit else length


def _bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers as they are stored, tied ones once."""
    seen = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
