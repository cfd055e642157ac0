"""The block loop: capture, solve, refine, pack and pass on, one transformer block after the other.

A block's FP32 copy, its Gram matrices and its activations live on the compute device only while the block is at
work. Each finished block goes to a sink; the pipeline never assumes that the whole model is in memory.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from .blocks import Layer, find_stacks, plan_layers, record_calls, replay, weight_shape
from .gram import GramAccumulator, ScaledGram, squared_error
from .matching import WorkingLinear, match_block
from .modules import SparseLRLinear
from .report import Report, layer_line
from .solvers import METHODS

if TYPE_CHECKING:
    from .config import SparseLRConfig

logger = logging.getLogger("hf_sparselr")


class _Reached(Exception):  # noqa: N818 (not an error: the rest of the block is not needed)
    pass


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


def run(model: nn.Module, config: "SparseLRConfig", windows: list[torch.Tensor], sink: Sink) -> Report:
    """Compresses the blocks of a model.

    Args:
        model: dense, not on the meta device. Its blocks are replaced through the sink.
        windows: token ids, 1-D int64, on the CPU.

    Returns:
        The report, without `sizes`.

    Raises:
        ValueError: what `plan_layers` raises; NaN or Inf in a weight or in a layer's inputs; a layer without inputs.
    """
    started = time.perf_counter()
    plan = plan_layers(model, config)
    _check_weights(model, plan)
    report = Report(config.to_dict())
    batches = make_batches(windows, _micro_batch(config))
    stacks = find_stacks(model)
    bar = transformers_logging.tqdm(
        total=sum(map(len, stacks.values())), desc="Compressing blocks", unit="block"
    )
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    model.eval()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        for name, stack in stacks.items():
            recording = record_calls(model, stack, batches)
            hidden = recording.inputs
            for index in range(len(stack)):
                worker = _BlockWorker(f"{name}.{index}", stack[index], plan, config, report)
                block, hidden = worker.work(hidden, recording.calls[index])
                _set_modes(stack[index], f"{name}.{index}", modes)  # the sink may bring it back
                sink(stack, index, block)
                recording.calls[index] = []
                bar.update()
    finally:
        bar.close()
        _set_modes(model, "", modes)
    report.seconds = time.perf_counter() - started
    report.peak_memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return report


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
    if config.refine is None:
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


class _BlockWorker:
    """Works on a copy of one block, so that an error leaves the model as it was."""

    def __init__(
        self, name: str, block: nn.Module, plan: dict[str, Layer], config: "SparseLRConfig", report: Report
    ) -> None:
        self.name = name
        self.config = config
        self.report = report
        self.layers = {
            inner: plan[f"{name}.{inner}"] for inner, _ in block.named_modules() if f"{name}.{inner}" in plan
        }
        own = next(block.parameters()).device
        self.home = own
        self.device = _work_device(config.device, own)
        self.dtypes = {key: tensor.dtype for key, tensor in _floats(block)}
        self.block = copy.deepcopy(block).to(self.device)
        for _, tensor in _floats(self.block):
            tensor.data = tensor.data.float()

    def work(self, hidden: list[torch.Tensor], calls: list) -> tuple[nn.Module, list[torch.Tensor]]:
        """Returns the finished block and the next block's inputs."""
        started = time.perf_counter()
        hidden = [batch.to(self.device, torch.float32) for batch in hidden]
        row = {"name": self.name, "tm": None}
        if self.layers:
            targets, groups = self._dense_pass(hidden, calls)
            self._solve(groups, hidden, calls)
            if self.config.refine == "tm":
                row["tm"] = self._match(hidden, targets, calls)
            del targets
        self._round()
        with torch.no_grad():
            hidden = [replay(self.block, batch, call) for batch, call in zip(hidden, calls, strict=True)]
        self._pack()
        row["seconds"] = time.perf_counter() - started
        self.report.blocks.append(row)
        return self.block, hidden

    @torch.no_grad()
    def _dense_pass(
        self, hidden: list[torch.Tensor], calls: list
    ) -> tuple[list[torch.Tensor], list[list[str]]]:
        """The dense block's outputs, and its layers in the order of their calls, grouped by common input."""
        groups: dict[tuple, list[str]] = {}
        alive: list[torch.Tensor] = []  # while they live, equal addresses mean the same tensor

        def hook(layer: str):
            def note(module, args):
                key = (args[0].data_ptr(), args[0].shape, args[0].stride())
                groups.setdefault(key, []).append(layer)
                alive.append(args[0])

            return note

        handles = [
            self.block.get_submodule(layer).register_forward_pre_hook(hook(layer)) for layer in self.layers
        ]
        outputs = []
        for batch, call in zip(hidden, calls, strict=True):
            outputs.append(replay(self.block, batch, call))
            for handle in handles:  # one batch shows it
                handle.remove()
            alive.clear()
        called = [layer for group in groups.values() for layer in group]
        unused = [layer for layer in self.layers if layer not in called]
        if unused:
            raise ValueError(
                f"{self.name}.{unused[0]} saw no calibration input ({len(unused)} such layers): ignore it, or pass "
                "other data"
            )
        return outputs, [list(dict.fromkeys(group)) for group in groups.values()]

    @torch.no_grad()
    def _gram(self, layer: str, hidden: list[torch.Tensor], calls: list) -> torch.Tensor:
        """X^T X of a layer's inputs in the block as it now is, up to that layer."""
        module = self.block.get_submodule(layer)
        accumulator = GramAccumulator(weight_shape(module)[1], self.device)

        def collect(module, args):
            accumulator.add(args[0])
            raise _Reached

        handle = module.register_forward_pre_hook(collect)
        try:
            for batch, call in zip(hidden, calls, strict=True):
                with suppress(_Reached):
                    replay(self.block, batch, call)
        finally:
            handle.remove()
        return accumulator.gram

    def _solve(self, groups: list[list[str]], hidden: list[torch.Tensor], calls: list) -> None:
        """Replaces every planned layer by its decomposition, group after group.

        The layers of a group share a Gram matrix and its factorisation, of inputs that already passed the compressed
        layers before them.
        """
        bar = transformers_logging.tqdm(
            total=len(self.layers), desc="  solving layers", leave=False, unit="layer"
        )
        for group in groups:
            gram = self._gram(group[0], hidden, calls)
            try:
                scaled = ScaledGram(gram, self.config.damping)
            except ValueError as error:
                raise ValueError(f"{self.name}.{group[0]}: {error}") from error
            for layer in group:
                self._solve_layer(layer, gram, scaled)
                bar.update()
        bar.close()

    def _solve_layer(self, inner: str, gram: torch.Tensor, scaled: ScaledGram) -> None:
        started = time.perf_counter()
        layer, config = self.layers[inner], self.config
        module = self.block.get_submodule(inner)
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        solve = METHODS[config.method].solve
        result = solve(weight, scaled, layer.pattern, layer.rank, config.solver, seed=config.seed)
        error = squared_error(weight - result.dense(), gram) / max(squared_error(weight, gram), 1e-30)
        self._add_row(layer, weight_shape(module), result, error, time.perf_counter() - started)
        working = WorkingLinear(result, module.bias)
        working.transposed = isinstance(module, Conv1D)
        self.block.set_submodule(inner, working)

    def _add_row(self, layer: Layer, shape, result, error: float, seconds: float) -> None:
        row = {
            "name": layer.name,
            "shape": list(shape),
            "pattern": str(layer.pattern),
            "rank": layer.rank,
            "sparsity": 1 - int(result.mask.sum()) / result.mask.numel(),
            "relative_error": error,
            "seconds": seconds,
            **result.stats,
        }
        self.report.layers.append(row)
        logger.info(layer_line(row))

    def _match(self, hidden: list[torch.Tensor], targets: list[torch.Tensor], calls: list) -> dict:
        options = self.config.tm
        bar = transformers_logging.tqdm(
            total=options.passes, desc="  transformer matching", leave=False, unit="pass"
        )

        def on_pass(loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")

        stats = match_block(self.block, hidden, targets, calls, options, self.config.seed, on_pass)
        bar.close()
        logger.info(
            f"{self.name}: transformer matching took the block's squared error from {stats['loss_before']:.3e} "
            f"to {stats['loss_after']:.3e} in {stats['seconds']:.1f} s"
        )
        return stats

    def _stored_dtype(self, key: str) -> torch.dtype:
        """The dtype a tensor of the working block will be stored in."""
        if key in self.dtypes:
            return self.dtypes[key]
        return self.dtypes[f"{key.rpartition('.')[0]}.weight"]

    def _round(self) -> None:
        """Rounds to the stored dtypes but stays FP32: later blocks see what will be stored."""
        for key, tensor in _floats(self.block):
            tensor.data = tensor.data.to(self._stored_dtype(key)).float()

    def _pack(self) -> None:
        for inner in self.layers:
            working = self.block.get_submodule(inner)
            packed = SparseLRLinear.from_decomposition(
                working.decomposition(),
                working.bias,
                transposed=working.transposed,
                dtype=self._stored_dtype(f"{inner}.S"),
            )
            self.block.set_submodule(inner, packed)
        for key, tensor in _floats(self.block):
            if key in self.dtypes:
                tensor.data = tensor.data.to(self.dtypes[key])
        self.block.to(self.home)


def _floats(module: nn.Module):
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point()]


def _work_device(asked, own: torch.device) -> torch.device:
    if asked is not None:
        return torch.device(asked)
    if own.type != "cpu":
        return own
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
