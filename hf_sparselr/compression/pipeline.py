"""The block loop: one transformer block after the other is compressed and handed to a sink.

The loop itself holds one block. Where finished blocks go, into the model or into a file, is the sink's matter. The work
on one block is in `block`.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Set

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..config.sparselr_config import SparseLRConfig
from ..data.model_inputs import Sample, make_batches
from ..utils.modules import eval_mode
from ..utils.precision import matmuls
from ..utils.world import ALONE, World
from .allocation import allocate
from .block import BlockInputs, BlockResult, compress_block
from .capture import BrokenChainError, Recording, capture_block_inputs, capture_calls
from .distillation import copy_sharing_blocks
from .distributed import even_batch, spread
from .measuring import dense_groups
from .model_structure import Stacks, find_stacks, shared_tensors
from .plan import Layer, reachable_plan
from .precomputed import Precomputed
from .report import Report
from .survey import Survey, survey_blocks
from .training_loop import hold_back

Sink = Callable[[str, nn.Module], None]  # (dotted name of the block, finished block)

logger = logging.getLogger("hf_sparselr")


@matmuls("highest")
def run(
    model: nn.Module,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    samples: list[Sample],
    sink: Sink,
    precomputed: Precomputed | None = None,
    world: World = ALONE,
) -> Report:
    """Compresses the blocks of a model.

    Args:
        model: dense, not on the meta device. Only the sink changes it.
        plan: the layers to compress, from `plan_layers`.
        samples: calibration samples on the CPU.
        sink: takes the finished blocks, in the order in which the model calls them.
        precomputed: decompositions of the model's layers, for refinement alone.
        world: the processes that share the work; all have the same arguments, and hand the same blocks to their sinks.

    Returns:
        The report, without `sizes`.

    Raises:
        ValueError: NaN or Inf in a weight or in a layer's inputs, naming the layer; stacks that no sample reaches.
    """
    started = time.perf_counter()
    _check_weights(model, plan)
    report = Report(config.to_dict())
    all_batches, kept_back = _batches(samples, config, world)
    batches, kept_back = spread(all_batches, kept_back, world)
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    model.eval()
    try:
        stacks = find_stacks(model)
        versions = {name: model.get_submodule(name).weight._version for name in plan}
        survey = survey_blocks(model, stacks, all_batches)
        edited = {name for name, version in versions.items() if model.get_submodule(name).weight._version != version}
        plan, report.dense = reachable_plan(plan, stacks, survey.order, edited, config)
        segments = _working_order(stacks, survey, plan)
        groups = dense_groups(model, plan, config, batches, segments, survey, world)
        plan, report.allocation = allocate(config, plan, groups)
        bar = transformers_logging.tqdm(total=sum(map(len, segments)), desc="Compressing blocks", unit="block")
        work = _compressed_blocks(model, plan, config, segments, survey, batches, kept_back, precomputed, world)
        for name, result in work:
            report.layers += result.layer_rows
            report.blocks.append(result.row)
            report.dense |= result.dense
            _set_modes(result.block, name, modes)
            sink(name, result.block)
            bar.update()
        bar.close()
    finally:
        _set_modes(model, "", modes)
    report.seconds = time.perf_counter() - started
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


def _compressed_blocks(
    model: nn.Module,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    segments: list[dict[str, nn.Module]],
    survey: Survey,
    batches: list[Sample],
    kept_back: int,
    precomputed: Precomputed | None,
    world: World,
) -> Iterator[tuple[str, BlockResult]]:
    """Compresses one block after the other: (name, result). The sink takes one before the next is asked for."""
    reference = precomputed.reference if precomputed else None
    shared = shared_tensors(model)
    if reference is None and _needs_dense_stream(config) and not _all_chains(segments, survey):
        reference = copy_sharing_blocks(model, find_stacks(model))
    for segment in segments:
        if all(survey.most_calls[name] == 1 for name in segment):
            try:
                yield from _chain(model, plan, config, segment, batches, kept_back, precomputed, shared, world)
                continue
            except BrokenChainError:
                pass  # not on all samples
        for name in segment:
            yield (
                name,
                _single(model, plan, config, name, survey, batches, kept_back, precomputed, reference, shared, world),
            )


def _all_chains(segments: list[dict[str, nn.Module]], survey: Survey) -> bool:
    return all(survey.most_calls[name] == 1 for segment in segments for name in segment)


def _chain(
    model: nn.Module,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    blocks: dict[str, nn.Module],
    batches: list[Sample],
    kept_back: int,
    precomputed: Precomputed | None,
    shared: Set[int],
    world: World,
) -> Iterator[tuple[str, BlockResult]]:
    """A chain: one pass of the model records all arguments, and each block's outputs are the next one's inputs."""
    recording = _recorded(model, blocks, batches, world)
    kept_back = sum(index >= len(batches) - kept_back for index in recording.batches)
    inputs = BlockInputs(recording.inputs, None, [], kept_back)
    if _needs_dense_stream(config):
        inputs.dense_hidden = recording.inputs
        if precomputed:
            inputs.dense_hidden = _first_inputs(precomputed.reference, blocks, batches)
    for name, block in blocks.items():
        inputs.calls = recording.calls.pop(name)
        result = compress_block(name, block, plan, inputs, config, precomputed, shared, world)
        inputs.hidden, inputs.dense_hidden = result.hidden, result.dense_hidden
        yield name, result


def _recorded(model: nn.Module, blocks: dict[str, nn.Module], batches: list[Sample], world: World) -> Recording:
    """`capture_block_inputs`; a chain that is broken in one process is broken in all."""
    recording, broken = None, None
    try:
        recording = capture_block_inputs(model, blocks, batches)
    except BrokenChainError as error:
        broken = error
    if world.any(recording is None) or recording is None:
        raise broken or BrokenChainError("in another process")
    return recording


def _first_inputs(model: nn.Module, blocks: dict[str, nn.Module], batches: list[Sample]) -> list[torch.Tensor]:
    with eval_mode(model):
        own = {name: model.get_submodule(name) for name in blocks}
        return capture_block_inputs(model, own, batches).inputs


def _single(
    model: nn.Module,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    name: str,
    survey: Survey,
    batches: list[Sample],
    kept_back: int,
    precomputed: Precomputed | None,
    reference: nn.Module | None,
    shared: Set[int],
    world: World,
) -> BlockResult:
    """A block that is no part of a chain, or is called several times: passes of the whole model record its calls."""
    once = survey.most_calls[name] == 1
    hidden, calls, indices = capture_calls(model, name, batches, once)
    kept_back = sum(index >= len(batches) - kept_back for index in indices)
    inputs = BlockInputs(hidden, None, calls, kept_back)
    if _needs_dense_stream(config) and reference is not None:
        with eval_mode(reference):
            inputs.dense_hidden = capture_calls(reference, name, batches, once)[0]
    return compress_block(name, model.get_submodule(name), plan, inputs, config, precomputed, shared, world)


def replace_in(model: nn.Module) -> Sink:
    """The sink that puts finished blocks into a model in memory, wherever their dense selves are."""

    def sink(name: str, block: nn.Module) -> None:
        dense = model.get_submodule(name)
        for place, part in list(model.named_modules(remove_duplicate=False)):
            if part is dense:
                model.set_submodule(place, block)

    return sink


def _needs_dense_stream(config: SparseLRConfig) -> bool:
    return "tm" in config.refine_steps and config.tm.target != "block"


def _batches(samples: list[Sample], config: SparseLRConfig, world: World) -> tuple[list[Sample], int]:
    """Batches of all samples, and how many at the end hold those that are kept back from refinement."""
    size, trained = _micro_batch(config, world), len(samples)
    if config.refine_steps:
        trained -= hold_back(samples)
    kept_back = make_batches(samples[trained:], size)
    return make_batches(samples[:trained], size) + kept_back, len(kept_back)


def _micro_batch(config: SparseLRConfig, world: World) -> int:
    """Samples at a time: TM's steps must be made of whole batches, whatever `batch_size` is."""
    if "tm" not in config.refine_steps:
        return config.batch_size
    return even_batch(math.gcd(config.batch_size, config.tm.batch_size), config.tm.batch_size, world)


def _set_modes(module: nn.Module, name: str, modes: dict[str, bool]) -> None:
    """Puts every part of a module into the mode, train or eval, that stands beside its name.

    A part that the model made while it ran has the mode of the module around it.
    """
    for inner, part in module.named_modules(prefix=name):
        while inner not in modes:
            inner = inner.rpartition(".")[0]
        part.training = modes[inner]


def _check_weights(model: nn.Module, plan: dict[str, Layer]) -> None:
    for name in plan:
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(f"{name}.weight is not in memory (offloaded or meta): load the model without offloading")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight holds NaN or Inf")
