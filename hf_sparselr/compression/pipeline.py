"""The block loop: one transformer block after the other, each handed to a sink when it is done.

Nothing here assumes that the whole model is in memory; the work on one block is in `worker`.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..utils.modules import eval_mode
from ..utils.precision import matmuls
from .allocation import DenseGroup, allocate
from .block import BlockWorker
from .capture import capture_block_inputs
from .model_structure import find_stacks
from .plan import Layer, plan_layers
from .precomputed import Precomputed
from .report import Report

if TYPE_CHECKING:
    from ..config.sparselr_config import SparseLRConfig

Sink = Callable[[nn.ModuleList, int, nn.Module], None]  # (stack, index, finished block)


class InMemory:
    """The sink that puts finished blocks into the model; `undo` brings the dense ones back.

    Args:
        keep: hold on to the dense blocks until the run has succeeded (the model belongs to the user).
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._replaced: list[tuple[nn.ModuleList, int, nn.Module]] = []

    def __call__(self, stack: nn.ModuleList, index: int, block: nn.Module) -> None:
        if self._keep:
            self._replaced.append((stack, index, stack[index]))
        stack[index] = block

    def undo(self) -> None:
        for stack, index, block in self._replaced:
            stack[index] = block


@matmuls("highest")
def run(
    model: nn.Module,
    config: "SparseLRConfig",
    windows: list[torch.Tensor],
    sink: Sink,
    given: Precomputed | None = None,
) -> Report:
    """Compresses the blocks of a model.

    Args:
        model: dense, not on the meta device. Its blocks are replaced through the sink.
        windows: token ids, 1-D int64, on the CPU.
        given: decompositions of the model's layers, for refinement alone.

    Returns:
        The report, without `sizes`.

    Raises:
        ValueError: what `plan_layers` raises; NaN or Inf in a weight or in a layer's inputs; a layer without inputs.
    """
    started = time.perf_counter()
    plan = given.plan if given else plan_layers(model, config)
    reference = given.reference if given else model
    _check_weights(model, plan)
    report = Report(config.to_dict())
    batches = make_batches(windows, _micro_batch(config))
    stacks, references = find_stacks(model), find_stacks(reference)
    bar = transformers_logging.tqdm(
        total=sum(map(len, stacks.values())), desc="Compressing blocks", unit="block"
    )
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    model.eval()
    try:
        plan, report.allocation = allocate(config, plan, _dense_groups(model, plan, config, batches))
        for name, stack in stacks.items():
            recording = capture_block_inputs(model, stack, batches)
            hidden, dense = recording.inputs, None
            if _needs_dense_stream(config):
                with eval_mode(reference):
                    dense = (
                        capture_block_inputs(reference, references[name], batches).inputs if given else hidden
                    )
            for index in range(len(stack)):
                worker = BlockWorker(f"{name}.{index}", stack[index], plan, config, report)
                if given:
                    worker.take(given, references[name][index])
                block, hidden, dense = worker.work(hidden, dense, recording.calls[index])
                _set_modes(stack[index], f"{name}.{index}", modes)  # the sink may bring it back
                sink(stack, index, block)
                recording.calls[index] = []
                bar.update()
    finally:
        bar.close()
        _set_modes(model, "", modes)
    report.seconds = time.perf_counter() - started
    report.peak_memory = max((peak for row in report.blocks for peak in row["peaks"].values()), default=None)
    return report


def _needs_dense_stream(config: "SparseLRConfig") -> bool:
    return "tm" in config.refine_steps and config.tm.target != "block"


@torch.no_grad()
def _dense_groups(
    model: nn.Module, plan: dict[str, Layer], config: "SparseLRConfig", batches: list[torch.Tensor]
) -> Iterator[DenseGroup]:
    """The planned layers of the dense model, of one block after the other."""
    stacks = find_stacks(model)
    bar = transformers_logging.tqdm(
        total=sum(map(len, stacks.values())), desc="Measuring blocks", unit="block"
    )
    for name, stack in stacks.items():
        recording = capture_block_inputs(model, stack, batches)
        hidden = recording.inputs
        for index, calls in enumerate(recording.calls):
            worker = BlockWorker(f"{name}.{index}", stack[index], plan, config, Report({}))
            hidden = yield from worker.dense_groups(hidden, calls)
            bar.update()
    bar.close()


def make_batches(windows: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    """Stacks consecutive windows of equal length: (<= size, length) each, never padded."""
    batches: list[list[torch.Tensor]] = []
    for window in windows:
        if not batches or len(batches[-1]) == size or len(batches[-1][0]) != len(window):
            batches.append([])
        batches[-1].append(window)
    return [torch.stack(batch) for batch in batches]


def _micro_batch(config: "SparseLRConfig") -> int:
    """Windows at a time: TM's steps must be made of whole batches, whatever `batch_size` is."""
    if "tm" not in config.refine_steps:
        return config.batch_size
    return math.gcd(config.batch_size, config.tm.batch_size)


def _set_modes(module: nn.Module, name: str, modes: dict[str, bool]) -> None:
    """Puts every part of a module into the mode, train or eval, that stands beside its name."""
    for inner, part in module.named_modules(prefix=name):
        part.training = modes[inner]


def _check_weights(model: nn.Module, plan: dict[str, Layer]) -> None:
    for name in plan:
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(
                f"{name}.weight is not in memory (offloaded or meta): load the model without offloading"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight holds NaN or Inf")
