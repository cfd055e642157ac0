"""The block loop: one transformer block after the other is compressed and handed to a sink.

The loop itself holds one block. Where finished blocks go, into the model or into a file, is the sink's matter. The work
on one block is in `block`.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import torch
from torch import nn

from ..config.sparselr_config import SparseLRConfig
from ..data.model_inputs import Sample, make_batches
from ..utils.modules import eval_mode
from ..utils.precision import LARGE, matmuls
from ..utils.world import ALONE, World
from .activations import Workplace
from .allocation import allocate
from .block import BlockInputs, BlockResult, compress_block, layers_of
from .block_source import BlockSource
from .capture import BrokenChainError, Keep, Recording, capture_block_inputs, capture_calls
from .distillation import copy_sharing_blocks
from .distributed import even_batch, spread
from .measuring import dense_groups
from .model_structure import Stacks, find_blocks, find_stacks, shared_tensors
from .noisy_windows import with_noisy_windows
from .plan import Layer, reachable_plan
from .precomputed import Precomputed
from .progress import Progress
from .report import Report
from .restored_block import restore_block
from .run_folder import RunFolder
from .survey import Survey, survey_blocks
from .training_loop import keep_back

Sink = Callable[[str, nn.Module], None]  # (dotted name of the block, finished block)

logger = logging.getLogger("hf_sparselr")

TOKENS = 4096  # at a time, of models with large layers


@dataclass(frozen=True)
class _Run:
    """What the work on every block needs, beside the block."""

    model: nn.Module
    plan: dict[str, Layer]
    config: SparseLRConfig
    survey: Survey
    batches: list[Sample]
    kept_back: int
    precomputed: Precomputed | None
    source: BlockSource
    folder: RunFolder | None
    shared: Set[int]
    world: World


@matmuls("highest")
def run(
    model: nn.Module,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    samples: list[Sample],
    sink: Sink,
    precomputed: Precomputed | None = None,
    source: BlockSource | None = None,
    folder: RunFolder | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Report:
    """Compresses the blocks of a model.

    Args:
        model: dense. Only the sink changes it.
        plan: the layers to compress, from `plan_layers`.
        samples: calibration samples on the CPU.
        sink: takes the finished blocks, in the order in which the model calls them.
        precomputed: decompositions of the model's layers, for refinement alone.
        source: where the weights of the blocks are; None: in the model.
        folder: stores finished blocks before the sink takes them, and has those of an earlier run.
        world: the processes that share the work; all have the same arguments, and hand the same blocks to their sinks.
        progress: told of every block.

    Returns:
        The report, without `sizes`.

    Raises:
        ValueError: NaN or Inf in a weight or in a layer's inputs, naming the layer; stacks that no sample reaches.
    """
    started = time.perf_counter()
    source, progress = source or BlockSource(model), progress or Progress()
    if not source.streamed:
        _check_weights(model, plan)
    report = Report(config.to_dict())
    large = any(model.get_submodule(name).weight.numel() > LARGE for name in plan)
    all_batches, kept_back = _batches(model, samples, config, large, world)
    batches, kept_back = spread(all_batches, kept_back, world)
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    model.eval()
    try:
        stacks = find_stacks(model)
        versions = {name: model.get_submodule(name).weight._version for name in plan}
        with source.on_call():
            survey = survey_blocks(model, stacks, all_batches)
        edited = {name for name, version in versions.items() if model.get_submodule(name).weight._version != version}
        edited |= {name for name in plan if f"{name}.weight" in source.edited}
        plan, report.dense = reachable_plan(plan, stacks, survey.order, edited, config)
        segments = _working_order(stacks, survey, plan)
        groups = dense_groups(model, plan, config, batches, segments, survey, source, world)
        plan, report.allocation = allocate(config, plan, groups)
        shared = shared_tensors(model)
        work = _Run(model, plan, config, survey, batches, kept_back, precomputed, source, folder, shared, world)
        earlier = set(folder.finished) if folder is not None else set()
        progress.start(sum(map(len, segments)), len(earlier))
        for name, result in _compressed_blocks(work, segments):
            report.layers += result.layer_rows
            report.blocks.append(result.row)
            report.dense |= result.dense
            if folder is not None:
                folder.store(name, result.block, result.row, result.layer_rows, result.dense, shared)
            _set_modes(result.block, name, modes)
            sink(name, result.block)
            progress.block(result.row, result.layer_rows, name in earlier)
        progress.blocks_done()
    finally:
        _set_modes(model, "", modes)
    restored = sum(row["seconds"] for row in report.blocks if row["name"] in earlier)
    report.seconds = time.perf_counter() - started + restored
    report.peak_memory = max((peak for row in report.blocks for peak in row["peaks"].values()), default=None)
    return report


def _working_order(stacks: Stacks, survey: Survey, plan: dict[str, Layer]) -> list[dict[str, nn.Module]]:
    """The blocks to work on, in the order in which the model calls them: whole chains, and other blocks one by one."""
    segments: dict[str, dict[str, nn.Module]] = {}  # by the first block
    stack_of = {name: stack for stack, blocks in stacks.items() for name in blocks}
    planned = {stack for stack, blocks in stacks.items() if any(_has_layers(name, plan) for name in blocks)}
    for name in survey.order:
        stack = stack_of[name]
        if stack not in planned:
            continue
        if stack not in survey.chains:
            if _has_layers(name, plan):
                segments[name] = {name: stacks[stack][name]}
        elif stack not in {stack_of[first] for first in segments}:
            segments[name] = {key: block for key, block in stacks[stack].items() if key in survey.order}
    return list(segments.values())


def _has_layers(block: str, plan: dict[str, Layer]) -> bool:
    return any(name.startswith(f"{block}.") for name in plan)


def _compressed_blocks(work: _Run, segments: list[dict[str, nn.Module]]) -> Iterator[tuple[str, BlockResult]]:
    """Compresses one block after the other: (name, result). The sink takes one before the next is asked for."""
    reference = work.precomputed.reference if work.precomputed else None
    if reference is None and _needs_dense_stream(work.config) and not _all_chains(segments, work.survey):
        if work.source.streamed:
            raise ValueError(
                f"tm.target={work.config.tm.target!r}: the blocks of this model are no chain, and their dense "
                "activations need the whole dense model in memory: use stream=False, or tm.target='block'"
            )
        reference = copy_sharing_blocks(work.model, find_blocks(work.model))
    for segment in segments:
        if all(work.survey.most_calls[name] == 1 for name in segment):
            try:
                yield from _chain(work, segment)
                continue
            except BrokenChainError:
                pass  # not on all samples
        for name in segment:
            yield name, _single(work, name, reference)


def _all_chains(segments: list[dict[str, nn.Module]], survey: Survey) -> bool:
    return all(survey.most_calls[name] == 1 for segment in segments for name in segment)


def _chain(work: _Run, blocks: dict[str, nn.Module]) -> Iterator[tuple[str, BlockResult]]:
    """A chain: one pass of the model records all arguments, and each block's outputs are the next one's inputs."""
    finished = work.folder.finished if work.folder else {}
    left = [name for name in blocks if name not in finished]
    inputs = _chain_inputs(work, blocks) if left else None
    for name in blocks:
        if inputs is not None:
            inputs.calls = inputs.recorded.pop(name)
        result = _work_on(work, name, inputs)
        if inputs is not None:
            inputs.hidden, inputs.dense_hidden = result.hidden, result.dense_hidden
            result.hidden, result.dense_hidden = [], None  # they end with the next block
        yield name, result
        if left and name == left[-1]:
            inputs = None  # the blocks after it are finished


def _chain_inputs(work: _Run, blocks: dict[str, nn.Module]) -> BlockInputs:
    first = next(iter(blocks.values()))
    keep = Workplace.of(first, work.config).keep
    recording = _recorded(work, blocks, keep)
    kept_back = sum(index >= len(work.batches) - work.kept_back for index in recording.batches)
    inputs = BlockInputs(recording.inputs, None, [], kept_back, recording.calls)
    if _needs_dense_stream(work.config):
        inputs.dense_hidden = recording.inputs
        if work.precomputed:
            inputs.dense_hidden = _first_inputs(work.precomputed.reference, blocks, work.batches, keep)
    return inputs


def _recorded(work: _Run, blocks: dict[str, nn.Module], keep: Keep) -> Recording:
    """`capture_block_inputs`; a chain that is broken in one process is broken in all."""
    recording, broken = None, None
    try:
        with work.source.on_call():
            recording = capture_block_inputs(work.model, blocks, work.batches, keep)
    except BrokenChainError as error:
        broken = error
    if work.world.any(recording is None) or recording is None:
        raise broken or BrokenChainError("in another process")
    return recording


def _first_inputs(
    model: nn.Module, blocks: dict[str, nn.Module], batches: list[Sample], keep: Keep
) -> list[torch.Tensor]:
    with eval_mode(model):
        own = {name: model.get_submodule(name) for name in blocks}
        return capture_block_inputs(model, own, batches, keep).inputs


def _single(work: _Run, name: str, reference: nn.Module | None) -> BlockResult:
    """A block that is no part of a chain, or is called several times: passes of the whole model record its calls."""
    if work.folder and name in work.folder.finished:
        return _work_on(work, name, None)
    once = work.survey.most_calls[name] == 1
    with work.source.on_call():
        hidden, calls, indices = capture_calls(work.model, name, work.batches, once)
    kept_back = sum(index >= len(work.batches) - work.kept_back for index in indices)
    inputs = BlockInputs(hidden, None, calls, kept_back)
    if _needs_dense_stream(work.config) and reference is not None:
        with eval_mode(reference):
            inputs.dense_hidden = capture_calls(reference, name, work.batches, once)[0]
    return _work_on(work, name, inputs)


def _work_on(work: _Run, name: str, inputs: BlockInputs | None) -> BlockResult:
    """Compresses a block, or takes it from the folder.

    Args:
        inputs: None where the block is finished, and no block after it needs its outputs.
    """
    finished = work.folder.finished.get(name) if work.folder else None
    if work.folder and finished and (inputs is None or inputs.dense_hidden is None):
        block = work.model.get_submodule(name)
        return restore_block(block, finished, work.folder.file(name), inputs, work.config, work.world)
    with work.source.loaded(name) as block:
        if work.folder and finished:
            return restore_block(block, finished, work.folder.file(name), inputs, work.config, work.world)
        if work.source.streamed:
            _check_weights(work.model, layers_of(name, block, work.plan))
        return compress_block(name, block, work.plan, inputs, work.config, work.precomputed, work.shared, work.world)


def _needs_dense_stream(config: SparseLRConfig) -> bool:
    return "tm" in config.refine_steps and config.tm.target != "block"


def _batches(
    model: nn.Module, samples: list[Sample], config: SparseLRConfig, large: bool, world: World
) -> tuple[list[Sample], int]:
    """Batches of all samples and noisy ones, and how many at the end hold those that are kept back from refinement.

    Args:
        large: whether the model has large layers.
    """
    size = _micro_batch(config, samples, large, world)
    trained, judging = keep_back(samples) if config.refine_steps else (samples, [])
    trained = with_noisy_windows(trained, config.noisy_windows, model, config.seed)
    kept_back = make_batches(judging, size)
    return make_batches(trained, size) + kept_back, len(kept_back)


def _micro_batch(config: SparseLRConfig, samples: list[Sample], large: bool, world: World) -> int:
    """Samples at a time: TM's steps must be made of whole batches, whatever `batch_size` is.

    Large layers are as fast with fewer tokens, and the block's activations take less memory.
    """
    size = config.batch_size
    if "tm" in config.refine_steps:
        size = even_batch(math.gcd(size, config.tm.batch_size), config.tm.batch_size, world)
    if not large:
        return size
    longest = max((tensor.shape[1] for sample in samples for tensor in sample.values() if tensor.ndim == 2), default=1)
    return max((each for each in range(1, size + 1) if size % each == 0 and each * longest <= TOKENS), default=1)


def _set_modes(module: nn.Module, name: str, modes: dict[str, bool]) -> None:
    """Puts every part of a module into the mode, train or eval, that stands beside its name.

    A part that the model made while it ran has the mode of the module around it.
    """
    for inner, part in module.named_modules(prefix=name):
        while inner not in modes:
            inner = inner.rpartition(".")[0]
        part.training = modes[inner]


def _check_weights(model: nn.Module, plan: dict[str, Layer]) -> None:
    for name in (layer.name for layer in plan.values()):
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(f"{name}.weight is not in memory (offloaded or meta): load the model without offloading")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight holds NaN or Inf")
