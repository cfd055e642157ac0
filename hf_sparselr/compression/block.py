"""The work on one block: capture, solve, refine, round and pack.

A block's FP32 copy, its Gram matrices and its activations live on the compute device only while the block is at
work.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from ..format.decomposition import Decomposition
from ..nn.linear import SparseLRLinear
from ..solvers.gram import GramAccumulator, ScaledGram, squared_error
from ..solvers.registry import METHODS
from ..utils.modules import move_to_device, named_tensors
from ..utils.phase_timer import PhaseTimer
from ..utils.precision import arithmetic
from .allocation import DenseGroup
from .capture import replay
from .model_structure import dense_weight, weight_shape
from .plan import Layer
from .precomputed import Precomputed
from .report import Report, layer_line
from .training_loop import resolve_precision
from .transformer_matching import match_block
from .working_linear import WorkingLinear

if TYPE_CHECKING:
    from ..config.sparselr_config import SparseLRConfig

logger = logging.getLogger("hf_sparselr")

TRIAL_WINDOWS = 8  # on which an allocation measures what a block loses


class _Reached(Exception):  # noqa: N818 (not an error: the rest of the block is not needed)
    pass


class BlockWorker:
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
        self.device = work_device(config.device, own)
        self.tm = resolve_precision(config.tm, block)
        self.precision = self.tm.precision
        self.storage = self.device if config.activations == "device" else torch.device("cpu")
        self.stored = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.phases = PhaseTimer(self.device)
        self.dtypes = {key: tensor.dtype for key, tensor in _floats(block)}
        self.block = self.dense = self._copy(block)
        self.given: Precomputed | None = None

    def _copy(self, block: nn.Module) -> nn.Module:
        block = copy.deepcopy(block).to(self.device).eval()
        for _, tensor in _floats(block):
            tensor.data = tensor.data.float()
        return block

    def take(self, given: Precomputed, dense: nn.Module) -> None:
        """Takes the block's decompositions as given, and its dense self from elsewhere."""
        self.given, self.dense = given, self._copy(dense)

    def work(
        self, hidden: list[torch.Tensor], dense: list[torch.Tensor] | None, calls: list
    ) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor] | None]:
        """Returns the finished block and the next block's inputs.

        Args:
            hidden: the block's inputs, which passed the compressed blocks before it.
            dense: the same in the dense model, or None where no target needs them.
        """
        started = time.perf_counter()
        row = {"name": self.name, "tm": None}
        with self.phases("propagation"):
            hidden, calls = (
                self._kept(hidden),
                move_to_device(calls, self.storage),
            )  # no pass waits for arguments
            if dense is not None:
                dense = self._forward(self.dense, self._kept(dense), calls)
        if self.layers:
            with self.phases("capture and Gram"):
                groups = self._groups(hidden, calls)
                targets = self._targets(hidden, dense, calls)
            self._solve(groups, hidden, calls)
            if targets is not None:
                with self.phases("TM"):
                    row["tm"] = self._match(hidden, targets, calls)
            del targets
        with self.phases("propagation"):
            self._round()
            hidden = self._forward(self.block, hidden, calls)
            self._pack()
        row["seconds"] = time.perf_counter() - started
        row["phases"] = self.phases.seconds
        row["peaks"] = self.phases.peaks
        self.report.blocks.append(row)
        return self.block, hidden, dense

    def _kept(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Hidden states where, and as, they are kept."""
        return [batch.to(self.storage, self.stored) for batch in hidden]

    @torch.no_grad()
    def _forward(self, block: nn.Module, hidden: list[torch.Tensor], calls: list) -> list[torch.Tensor]:
        """The outputs of the block at work, or of its dense self."""
        with arithmetic(self.device, self.precision):
            outputs = (replay(block, batch, call) for batch, call in zip(hidden, calls, strict=True))
            return [out.to(self.storage, self.stored) for out in outputs]

    def _targets(
        self, hidden: list[torch.Tensor], dense: list[torch.Tensor] | None, calls: list
    ) -> list[torch.Tensor] | None:
        """What TM matches, see `TMOptions.target`; None without TM."""
        if "tm" not in self.config.refine_steps:
            return None
        if self.tm.target == "stream":
            return dense
        own = self._forward(self.dense, hidden, calls)
        if self.tm.target == "mean":
            for mine, theirs in zip(own, dense, strict=True):
                mine.lerp_(theirs, 0.5)
        return own

    @torch.no_grad()
    def _groups(self, hidden: list[torch.Tensor], calls: list) -> list[list[str]]:
        """The layers in the order of their calls, grouped by common input."""
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
        for batch, call in zip(hidden, calls, strict=True):
            with arithmetic(self.device, self.precision):
                replay(self.block, batch, call)
            if set(self.layers) == {layer for group in groups.values() for layer in group}:
                break  # one batch shows it, as a rule
            alive.clear()
        for handle in handles:
            handle.remove()
        called = {layer for group in groups.values() for layer in group}
        unused = [layer for layer in self.layers if layer not in called]
        if unused:
            raise ValueError(
                f"{self.name}.{unused[0]} saw no calibration input ({len(unused)} such layers): ignore it, or pass "
                "other data"
            )
        return [list(dict.fromkeys(group)) for group in groups.values()]

    @torch.no_grad()
    def _gram(self, layer: str, hidden: list[torch.Tensor], calls: list) -> torch.Tensor:
        """X^T X of a layer's inputs in the block as it now is, up to that layer."""
        module = self.block.get_submodule(layer)
        accumulator = GramAccumulator(weight_shape(module)[1], self.device)

        def collect(module, args):
            accumulator.add(args[0].bfloat16() if self.precision == "bf16" else args[0])
            raise _Reached

        handle = module.register_forward_pre_hook(collect)
        try:
            for batch, call in zip(hidden, calls, strict=True):
                with suppress(_Reached), arithmetic(self.device, self.precision):
                    replay(self.block, batch, call)
        finally:
            handle.remove()
        return accumulator.gram

    def dense_groups(
        self, hidden: list[torch.Tensor], calls: list
    ) -> Generator[DenseGroup, None, list[torch.Tensor]]:
        """Yields the dense block's groups of layers, returns its outputs."""
        hidden = self._kept(hidden)
        outputs, output_loss = self._forward(self.dense, hidden, calls), self._output_loss(hidden, calls)
        for group in self._groups(hidden, calls):
            weights = {
                self.layers[inner].name: dense_weight(self.dense.get_submodule(inner)) for inner in group
            }
            gram = self._gram(group[0], hidden, calls)
            yield DenseGroup(self.name, weights, gram, self._scaled(group[0], gram), output_loss)
        return outputs

    def _output_loss(self, hidden: list[torch.Tensor], calls: list) -> Callable[[str, torch.Tensor], float]:
        """See `DenseGroup`; on the first windows, in TF32 at least: BF16 would hide small losses."""
        few = -(-TRIAL_WINDOWS // len(hidden[0]))

        @torch.no_grad()
        def forward() -> list[torch.Tensor]:
            with arithmetic(self.device, "tf32"):
                return [
                    replay(self.dense, batch, call)
                    for batch, call in zip(hidden[:few], calls[:few], strict=True)
                ]

        before = forward()
        energy = sum(float(batch.square().sum()) for batch in before)
        if not math.isfinite(energy):
            raise ValueError(f"{self.name}: the outputs of the dense block hold NaN or Inf")

        def output_loss(name: str, weight: torch.Tensor) -> float:
            module = self.dense.get_submodule(name.removeprefix(f"{self.name}."))
            own = module.weight.data
            module.weight.data = weight.T if isinstance(module, Conv1D) else weight
            pairs = zip(forward(), before, strict=True)
            module.weight.data = own
            return sum(float((new - old).square().sum()) for new, old in pairs) / energy

        return output_loss

    def _solve(self, groups: list[list[str]], hidden: list[torch.Tensor], calls: list) -> None:
        """Replaces every planned layer by its decomposition, group after group.

        The layers of a group share a Gram matrix and its factorisation, of inputs that already passed the compressed
        layers before them.
        """
        bar = transformers_logging.tqdm(
            total=len(self.layers), desc="  solving layers", leave=False, unit="layer"
        )
        for group in groups:
            with self.phases("capture and Gram"):
                gram = self._gram(group[0], hidden, calls)
            started = time.perf_counter()
            scaled = self._scaled(group[0], gram)
            with self.phases("solve"):
                results = self._decompose(group, scaled)
            for result in results:
                self.phases.add(result.stats.pop("phases", {}))
            seconds = (time.perf_counter() - started) / len(group)
            for inner, result in zip(group, results, strict=True):
                self._replace(inner, result, gram, seconds)
                bar.update()
        bar.close()

    def _scaled(self, inner: str, gram: torch.Tensor) -> ScaledGram:
        try:
            return ScaledGram(gram, self.config.damping)
        except ValueError as error:
            raise ValueError(f"{self.name}.{inner}: {error}") from error

    def _decompose(self, group: list[str], gram: ScaledGram) -> list[Decomposition]:
        layers, config = [self.layers[inner] for inner in group], self.config
        weights = [dense_weight(self.block.get_submodule(inner)) for inner in group]
        if self.given:
            return [
                self.given.decomposition(layer.name, weight)
                for layer, weight in zip(layers, weights, strict=True)
            ]
        return METHODS[config.method].solve_group(
            weights,
            gram,
            [layer.pattern for layer in layers],
            [layer.rank for layer in layers],
            config.method_options,
            config.seed,
        )

    def _replace(self, inner: str, result: Decomposition, gram: torch.Tensor, seconds: float) -> None:
        module = self.block.get_submodule(inner)
        weight = dense_weight(self.dense.get_submodule(inner))
        error = squared_error(weight - result.dense(), gram) / max(squared_error(weight, gram), 1e-30)
        self._add_row(self.layers[inner], weight_shape(module), result, error, seconds)
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
        bar = transformers_logging.tqdm(
            total=self.tm.passes, desc="  transformer matching", leave=False, unit="pass"
        )

        def on_pass(loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")

        stats = match_block(self.block, hidden, targets, calls, self.tm, self.config.seed, on_pass)
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


def _floats(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in named_tensors(module) if tensor.is_floating_point()]


def work_device(asked, own: torch.device) -> torch.device:
    if asked is not None:
        return torch.device(asked)
    if own.type != "cpu":
        return own
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
