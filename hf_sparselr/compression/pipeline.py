"""The block loop: one transformer block after the other is compressed and handed to a sink.

The loop itself holds one block. Where finished blocks go, into the model or into a file, is the sink's matter. The work
on one block is in `block`.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..config.sparselr_config import SparseLRConfig
from ..utils.modules import eval_mode
from ..utils.precision import matmuls
from .allocation import allocate
from .block import BlockInputs, compress_block
from .capture import capture_block_inputs
from .measuring import dense_groups
from .model_structure import find_stacks
from .plan import Layer
from .precomputed import Precomputed
from .report import Report
from .training_loop import hold_back

Sink = Callable[[str, nn.Module], None]  # (dotted name of the block, finished block)


@matmuls("highest")
def run(
    model: nn.Module,
    plan: dict[str, Layer],
    config: SparseLRConfig,
    windows: list[torch.Tensor],
    sink: Sink,
    precomputed: Precomputed | None = None,
) -> Report:
    """Compresses the blocks of a model.

    Args:
        model: dense, not on the meta device. It is not changed; its modes, train or eval, are as before at the end.
        plan: the layers to compress, from `plan_layers`.
        windows: token ids, 1-D int64, on the CPU.
        sink: takes the finished blocks, in order.
        precomputed: decompositions of the model's layers, for refinement alone.

    Returns:
        The report, without `sizes`.

    Raises:
        ValueError: NaN or Inf in a weight or in a layer's inputs, or a layer without inputs; naming the layer.
    """
    started = time.perf_counter()
    reference = precomputed.reference if precomputed else model
    _check_weights(model, plan)
    report = Report(config.to_dict())
    batches, kept_back = _batches(windows, config)
    stacks = find_stacks(model)
    bar = transformers_logging.tqdm(
        total=sum(map(len, stacks.values())), desc="Compressing blocks", unit="block"
    )
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    model.eval()
    try:
        plan, report.allocation = allocate(config, plan, dense_groups(model, plan, config, batches))
        for name, stack in stacks.items():
            recording = capture_block_inputs(model, stack, batches)
            inputs = BlockInputs(recording.inputs, None, [], kept_back)
            if _needs_dense_stream(config):
                inputs.dense_hidden = recording.inputs
                if precomputed:
                    inputs.dense_hidden = _first_inputs(reference, name, batches)
            for index, block in enumerate(stack):
                inputs.calls, recording.calls[index] = recording.calls[index], []
                result = compress_block(f"{name}.{index}", block, plan, inputs, config, precomputed)
                inputs.hidden, inputs.dense_hidden = result.hidden, result.dense_hidden
                report.layers += result.layer_rows
                report.blocks.append(result.row)
                _set_modes(block, f"{name}.{index}", modes)
                sink(f"{name}.{index}", result.block)
                bar.update()
    finally:
        bar.close()
        _set_modes(model, "", modes)
    report.seconds = time.perf_counter() - started
    report.peak_memory = max((peak for row in report.blocks for peak in row["peaks"].values()), default=None)
    return report


def replace_in(model: nn.Module) -> Sink:
    """The sink that puts finished blocks into a model in memory."""
    return model.set_submodule


def _first_inputs(model: nn.Module, stack: str, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    with eval_mode(model):
        return capture_block_inputs(model, model.get_submodule(stack), batches).inputs


def _needs_dense_stream(config: SparseLRConfig) -> bool:
    return "tm" in config.refine_steps and config.tm.target != "block"


def make_batches(windows: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    """Stacks consecutive windows of equal length: (<= size, length) each, never padded."""
    batches: list[list[torch.Tensor]] = []
    for window in windows:
        if not batches or len(batches[-1]) == size or len(batches[-1][0]) != len(window):
            batches.append([])
        batches[-1].append(window)
    return [torch.stack(batch) for batch in batches]


def _batches(windows: list[torch.Tensor], config: SparseLRConfig) -> tuple[list[torch.Tensor], int]:
    """Batches of all windows, and how many at the end hold the windows that are kept back from refinement."""
    size, trained = _micro_batch(config), len(windows)
    if config.refine_steps:
        trained -= hold_back(windows)
    kept_back = make_batches(windows[trained:], size)
    return make_batches(windows[:trained], size) + kept_back, len(kept_back)


def _micro_batch(config: SparseLRConfig) -> int:
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
