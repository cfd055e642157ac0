"""The work on one block: solve its layers, refine it, round and pack it.

A block's FP32 copy, its Gram matrices and its activations are on the compute device only while the block is at work.
"""

import copy
import logging
import time
from collections.abc import Set
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from ..config.options import TMOptions
from ..config.sparselr_config import SparseLRConfig
from ..format.checkpoint_hierarchy import owner
from ..utils.modules import detached_states, named_tensors, tensor_place
from ..utils.phase_timer import PhaseTimer
from ..utils.world import ALONE, World
from .activations import Workplace
from .capture import Call, replay
from .layer_inputs import LayerGroup, group_by_input
from .layer_solving import solve_layers
from .plan import Layer
from .precomputed import Precomputed
from .transformer_matching import match_block, resolve_precision
from .working_linear import WorkingLinear

logger = logging.getLogger("hf_sparselr")


@dataclass
class BlockInputs:
    """What a block is called with, a list entry a batch. Several processes have different batches.

    Attributes:
        hidden: hidden states that passed the compressed blocks before it.
        dense_hidden: the same in the dense model, or None where no target of transformer matching needs them. The work
            on the block takes them out.
        calls: the other arguments.
        kept_back: so many batches at the end are kept back from refinement, to judge it.
        recorded: the other arguments of the blocks after it in a chain, {block name: one a batch}.
    """

    hidden: list[torch.Tensor]
    dense_hidden: list[torch.Tensor] | None
    calls: list[Call]
    kept_back: int = 0
    recorded: dict[str, list[Call]] = field(default_factory=dict)


@dataclass
class BlockResult:
    """A finished block.

    Attributes:
        block: with packed layers, in the dtypes and on the device of the dense block.
        hidden, dense_hidden: the inputs of the next block.
        row: of the report.
        layer_rows: the rows of its layers.
        dense: {name of a planned layer that stays dense: why}.
    """

    block: nn.Module
    hidden: list[torch.Tensor]
    dense_hidden: list[torch.Tensor] | None
    row: dict
    layer_rows: list[dict]
    dense: dict[str, str]


def compress_block(
    name: str,
    block: nn.Module,
    plan: dict[str, Layer],
    inputs: BlockInputs,
    config: SparseLRConfig,
    precomputed: Precomputed | None = None,
    shared: Set[int] = frozenset(),
    world: World = ALONE,
) -> BlockResult:
    """Compresses a copy of a block; the block itself stays as it is.

    Args:
        name: of the block in the model.
        plan: of the whole model.
        precomputed: decompositions to take over. The dense block is then the one of its reference model.
        shared: ids of tensors that other parts of the model share. They stay the same objects, and are not trained.
        world: the processes that share the work. All return the same block.

    Raises:
        ValueError: naming the layer: NaN or Inf in its inputs.
    """
    started = time.perf_counter()
    place, layers = Workplace.of(block, config, world), layers_of(name, block, plan)
    phases, layer_rows, tm, unused = PhaseTimer(place.device), [], None, {}
    fixed = frozenset(key for key, tensor in named_tensors(block) if id(tensor) in shared)
    working = working_copy(block, place.device)
    dense = working_copy(precomputed.reference.get_submodule(name), place.device) if precomputed else working
    with phases("propagation"):
        hidden, calls = place.keep(inputs.hidden), place.keep_calls(inputs.calls)
        dense_hidden, inputs.dense_hidden = inputs.dense_hidden, None  # so that they end with this block
    if layers:
        with phases("capture and Gram"):
            groups = group_by_input(working, list(layers), hidden, calls, place)
            unused = _unused(name, working, layers, groups, hidden, calls, place)
        layer_rows = solve_layers(working, dense, layers, groups, hidden, calls, config, place, phases, precomputed)
    refined = bool(layers) and "tm" in config.refine_steps
    with phases("propagation"):
        if dense is working and layers and (refined or dense_hidden is not None):
            dense = working_copy(block, place.device)  # only now: the solves take most of the memory
        if dense_hidden is not None:
            dense_hidden = place.forward(dense, place.keep(dense_hidden), calls)
    if refined:
        with phases("capture and Gram"):
            targets = _matching_targets(dense, hidden, dense_hidden, calls, config, place)
            del dense
        with phases("TM"):
            options = resolve_precision(config.tm, block, place.device)
            tm = _match(name, working, hidden, targets, calls, config.seed, options, inputs.kept_back, fixed, world)
        del targets
    with phases("propagation"):
        dtypes = {key: tensor.dtype for key, tensor in _floats(block)}
        _round(working, dtypes)
        hidden = place.forward(working, hidden, calls)
        _pack(working, dtypes)
        _move_home(working, next(block.parameters()).device)
        _keep_shared(working, block, fixed)
    row = {
        "name": name,
        "tm": tm,
        "seconds": time.perf_counter() - started,
        "phases": phases.seconds,
        "peaks": phases.peaks,
    }
    return BlockResult(working, hidden, dense_hidden, row, layer_rows, unused)


def layers_of(name: str, block: nn.Module, plan: dict[str, Layer]) -> dict[str, Layer]:
    """The planned layers of a block: {name in the block: plan}."""
    names = [inner for inner, _ in block.named_modules()]
    return {inner: plan[f"{name}.{inner}"] for inner in names if f"{name}.{inner}" in plan}


def working_copy(block: nn.Module, device: torch.device) -> nn.Module:
    """A copy in FP32 on a device, in eval mode: an error then leaves the block as it was.

    The copy keeps the model's config objects: models read them while they run, and users set them later.
    """
    weights = {  # copied once, to where they are needed; both steps at once would make FP32 of them before they move
        id(parameter): nn.Parameter(
            parameter.detach().to(device, copy=True).float(), requires_grad=parameter.requires_grad
        )
        for parameter in block.parameters()
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    }
    block = copy.deepcopy(block, {**same_configs(block), **detached_states(block), **weights}).to(device)
    block.eval()  # not chained: some modules override `train` and return nothing
    for _, tensor in _floats(block):
        tensor.data = tensor.data.float()
    return block


def same_configs(block: nn.Module) -> dict[int, PreTrainedConfig]:
    """A memo for `copy.deepcopy` with which a copy has the config objects of a block."""
    values = (value for part in block.modules() for value in vars(part).values())
    return {id(value): value for value in values if isinstance(value, PreTrainedConfig)}


def _unused(
    name: str,
    block: nn.Module,
    layers: dict[str, Layer],
    groups: list[LayerGroup],
    hidden: list[torch.Tensor],
    calls: list[Call],
    place: Workplace,
) -> dict[str, str]:
    """The planned layers that no calibration input reached, and why: {dotted name: reason}."""
    called = {layer for group in groups for layer in group.layers}
    unused = [layer for layer in layers if layer not in called]
    if not unused:
        return {}
    found = place.world.objects(_reasons(block, unused, layers, hidden, calls) if hidden else None)
    return next(reasons for reasons in found if reasons is not None)


def _reasons(
    block: nn.Module, unused: list[str], layers: dict[str, Layer], hidden: list[torch.Tensor], calls: list[Call]
) -> dict[str, str]:
    weights = [block.get_submodule(layer).weight for layer in unused]
    flags = [weight.requires_grad for weight in weights]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        output = replay(block, hidden[0], calls[0])
        gradients = [None] * len(weights)
        if output.requires_grad:
            gradients = torch.autograd.grad(output.sum(), weights, allow_unused=True)
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    never, read = "no calibration input reached it", "its weight is read, the layer is not called"
    return {
        layers[layer].name: never if gradient is None else read
        for layer, gradient in zip(unused, gradients, strict=True)
    }


def _matching_targets(
    dense: nn.Module,
    hidden: list[torch.Tensor],
    dense_hidden: list[torch.Tensor] | None,
    calls: list[Call],
    config: SparseLRConfig,
    place: Workplace,
) -> list[torch.Tensor]:
    """The outputs that TM matches, see `TMOptions.target`."""
    if config.tm.target == "stream":
        return dense_hidden
    targets = place.forward(dense, hidden, calls)
    if config.tm.target == "mean":
        for own, stream in zip(targets, dense_hidden, strict=True):
            own.lerp_(stream, 0.5)
    return targets


def _match(
    name: str,
    block: nn.Module,
    hidden: list[torch.Tensor],
    targets: list[torch.Tensor],
    calls: list[Call],
    seed: int,
    options: TMOptions,
    kept_back: int,
    fixed: frozenset[str],
    world: World,
) -> dict:
    bar = transformers_logging.tqdm(total=options.passes, desc="  transformer matching", leave=False, unit="pass")

    def on_pass(loss: float) -> None:
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}")

    stats = match_block(block, hidden, targets, calls, options, seed, on_pass, kept_back, fixed, world)
    bar.close()
    logger.info(
        f"{name}: transformer matching took the block's squared error from {stats['loss_before']:.3e} to "
        f"{stats['loss_after']:.3e} in {stats['seconds']:.1f} s"
    )
    return stats


def _move_home(block: nn.Module, device: torch.device) -> None:
    """Moves a block to a device. What leaves a GPU goes through pinned memory, which is several times as fast."""
    for _, tensor in named_tensors(block) if device.type == "cpu" else ():
        if tensor.is_cuda:
            pinned = torch.empty_like(tensor, device=device, pin_memory=True)
            tensor.data = pinned.copy_(tensor).clone()
    block.to(device)


def _keep_shared(finished: nn.Module, block: nn.Module, names: frozenset[str]) -> None:
    """Gives a finished block the tensors back that the dense block shares with other parts of the model."""
    own = dict(named_tensors(block))
    for name in names:
        container, key, _ = tensor_place(finished, name)
        container[key] = own[name]


def _floats(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in named_tensors(module) if tensor.is_floating_point()]


def _stored_dtype(key: str, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype in which a tensor of the working block is stored: that of the dense block's tensor, or layer."""
    return dtypes[key] if key in dtypes else dtypes[f"{owner(key)}.weight"]


def _round(block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Rounds to the stored dtypes but stays FP32: later blocks see the values that are stored."""
    for key, tensor in _floats(block):
        tensor.data = tensor.data.to(_stored_dtype(key, dtypes)).float()


def _pack(block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, layer in list(block.named_modules()):
        if isinstance(layer, WorkingLinear):
            block.set_submodule(name, layer.pack(_stored_dtype(f"{name}.S", dtypes)))
    for key, tensor in _floats(block):
        if key in dtypes:
            tensor.data = tensor.data.to(dtypes[key])
