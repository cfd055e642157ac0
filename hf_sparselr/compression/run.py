"""Compress a model in memory: calibration, the block loop, distillation."""

import logging
import math
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..config.options import DistillOptions
from ..config.sparselr_config import SparseLRConfig
from ..data.model_inputs import Sample, make_batches
from ..utils.cuda_graphs import one_pool
from ..utils.modules import tensor_bytes
from ..utils.phase_timer import PhaseTimer
from ..utils.precision import available, plain_modes
from ..utils.public_names import loaded_from_hub
from ..utils.world import ALONE, World
from .activations import work_device
from .block_source import BlockSource
from .convolutions import linear_convolutions
from .coverage import coverage, log_coverage
from .distillation import check_logits, copy_sharing_blocks, distill, takes_batches
from .distributed import even_batch
from .expert_products import watch_experts
from .experts import fuse_experts, one_expert_at_a_time, unfuse_experts
from .linear_layers import weight_shape
from .masters import on_device
from .model_structure import find_blocks
from .noisy_windows import with_noisy_windows
from .pipeline import run
from .plan import Layer, usable_plan
from .precomputed import Precomputed
from .progress import FILE_NAME, Progress
from .report import Report
from .run_folder import RunFolder
from .samples import Samples, warn_of_few_tokens
from .training_loop import keep_back

logger = logging.getLogger("hf_sparselr")

CALIBRATION, SELF_WRITTEN = "calibration", "self-written"  # kinds of text, as reports name them


def compress_in_memory(
    model: PreTrainedModel,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    samples: Samples,
    precomputed: Precomputed | None = None,
    source: BlockSource | None = None,
    folder: RunFolder | None = None,
    world: World = ALONE,
) -> Report:
    """Turns a loaded model into a packed one. The caller attaches the report, and undoes errors.

    Args:
        plan: the layers to compress, from `plan_layers`.
        samples: of this config; the dense model writes them if they were not loaded.
        precomputed: decompositions to refine instead of solving.
        source: where the weights of the blocks are; None: in the model.
        folder: keeps finished blocks for a later run, and has those of an earlier one.
        world: the processes that compress together; each has the whole model.

    Raises:
        ValueError: before the work, for a model that cannot be distilled.
    """
    with plain_modes(work_device(config.device, model.device)), one_pool():
        return _compress(model, plan, config, samples, precomputed, source or BlockSource(model), folder, world)


def _compress(
    model: PreTrainedModel,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    samples: Samples,
    precomputed: Precomputed | None,
    source: BlockSource,
    folder: RunFolder | None,
    world: World,
) -> Report:
    base = precomputed.reference if precomputed else model
    dense_bytes, progress = tensor_bytes(model), _progress(folder, world)
    calibration = world.of_first(samples.calibration(base))
    teacher = None
    if "distill" in config.refine_steps:  # the model is replaced block by block, so its teacher is a copy
        teacher = precomputed.reference if precomputed else copy_sharing_blocks(model, find_blocks(model))
        device = work_device(config.device, model.device)
        with on_device(teacher, device, _distill_options(config, device)):
            check_logits(teacher, calibration[0], config)
    transposed, unusable = watch_experts(model, plan, calibration[0])
    plan, reasons = usable_plan(plan, unusable, config)
    unfuse_experts(model, plan, transposed)
    if precomputed:
        reference = copy_sharing_blocks(precomputed.reference, find_blocks(precomputed.reference))
        unfuse_experts(reference, plan, transposed)
        precomputed = replace(precomputed, reference=reference)
    blocks = list(find_blocks(model))
    with linear_convolutions(model, plan), one_expert_at_a_time(model):
        warn_of_few_tokens(calibration, {name: weight_shape(model.get_submodule(name))[1] for name in plan})
        report = run(model, plan, config, calibration, source.finish, precomputed, source, folder, world, progress)
    fuse_experts(model)  # those of which none was packed
    report.dense |= reasons
    report.coverage = coverage(model, blocks)
    log_coverage(report.coverage, report.dense)
    if line := report.experts_line():
        logger.warning("%s; pass more samples, or other ones", line)
    if teacher is not None:
        distill_in_memory(model, teacher, calibration, samples, report, world, progress)
    report.base_model = base.config.name_or_path or None
    report.base_on_hub = loaded_from_hub(base.config) is not None
    report.sizes = {"dense": dense_bytes, "packed": tensor_bytes(model)}
    progress.end(report.seconds)
    return report


def distill_in_memory(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    calibration: list[Sample],
    samples: Samples,
    report: Report,
    world: World = ALONE,
    progress: Progress | None = None,
) -> None:
    """Distils a packed model from the dense one.

    Args:
        calibration: the calibration samples; the dense model writes others beside them, if the config asks for that.
        world: the processes that train together.
        progress: told of every pass.
    """
    progress = progress or Progress()
    config = samples.config
    device = work_device(config.device, model.device)
    options = _distill_options(config, device)
    phases = PhaseTimer(device)
    with phases("distillation"), on_device(teacher, device, options):
        trained, judging = {}, {}
        written, beginnings = world.of_first(samples.for_distillation(teacher, calibration))
        kinds = {CALIBRATION: calibration, SELF_WRITTEN: written}
        if device.type == "cuda":  # writing leaves behind memory of many sizes that nothing else fits into
            torch.cuda.empty_cache()
        for kind, windows in kinds.items():
            apart, judging[kind] = keep_back(windows)
            trained[kind] = with_noisy_windows(apart, config.noisy_windows, teacher, config.seed)
        batched = takes_batches(teacher, calibration[0])
        size = math.gcd(config.batch_size, options.batch_size) if batched else 1
        size = even_batch(size, options.batch_size, world)

        def batches(parts: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
            """Batches with as many tokens of each kind, of this process."""
            longest = _length(calibration)
            sizes = {kind: size * max(1, longest // _length(own)) if batched else 1 for kind, own in parts.items()}
            return {kind: world.share(make_batches(own, sizes[kind])) for kind, own in parts.items()}

        bar = transformers_logging.tqdm(total=options.passes, desc="Distilling", unit="pass")

        def on_pass(loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            progress.distill(loss)

        report.distill = distill(
            model,
            teacher,
            [batch for own in batches(trained).values() for batch in own],
            options,
            config.seed,
            device,
            on_pass,
            batches(judging),
            world,
        )
        report.distill["self_written"] = beginnings
        bar.close()
    report.seconds += phases.seconds["distillation"]
    report.peak_memory = max(report.peak_memory or 0, *phases.peaks.values(), 0) or None
    logger.info(
        f"distillation took the divergence from the dense model from {report.distill['loss_before']:.4f} to "
        f"{report.distill['loss_after']:.4f} nats a prediction in {report.distill['seconds']:.1f} s"
    )


def _length(samples: list[Sample]) -> int:
    """The tokens of the longest of some samples; 1 where they are none."""
    return max((sample["input_ids"].shape[1] for sample in samples if "input_ids" in sample), default=1)


def _distill_options(config: SparseLRConfig, device: torch.device) -> DistillOptions:
    """The config's, with a precision that the device has."""
    return replace(config.distill, precision=available(config.distill.precision, device))


def _progress(folder: RunFolder | None, world: World) -> Progress:
    """Writes beside the run folder, which the first process does."""
    if folder is None or not world.first:
        return Progress()
    return Progress(folder.output_dir / FILE_NAME, goes_on=bool(folder.finished))
