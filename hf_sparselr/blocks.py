"""Find a model's transformer blocks, choose their layers, record how each block is called, replay one.

Nothing here names an architecture: blocks are found by structure, their arguments come from a real call.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .calibration import writes_text
from .checks import matches
from .patterns import Pattern
from .solvers import GIVEN

if TYPE_CHECKING:
    from .config import SparseLRConfig

logger = logging.get_logger("hf_sparselr")


@dataclass(frozen=True)
class Layer:
    """One linear layer to compress: its dotted name, the pattern of S and the rank of B A."""

    name: str
    pattern: Pattern
    rank: int


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost module lists that hold transformer blocks: {dotted name: list}, in order of definition.

    Raises:
        ValueError: the model has none.
    """
    # Importing this loads transformers.quantizers, which imports our quantizer, which imports this module.
    from transformers.modeling_layers import GradientCheckpointingLayer

    block_names = set(getattr(model, "_no_split_modules", None) or ())

    def is_block(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in block_names

    stacks = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(is_block, module)):
            stacks[name] = module
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks: expected an nn.ModuleList whose members are "
            "GradientCheckpointingLayer or named in _no_split_modules"
        )
    return stacks


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers inside the blocks: {dotted name: nn.Linear or Conv1D}."""
    return {
        f"{stack}.{name}": module
        for stack, blocks in find_stacks(model).items()
        for name, module in blocks.named_modules()
        if type(module) in (nn.Linear, Conv1D)
    }


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; a Conv1D stores (in, out)."""
    shape = tuple(layer.weight.shape)
    return shape[::-1] if isinstance(layer, Conv1D) else shape


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, (out, in); a view, without gradient."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def plan_layers(model: nn.Module, config: "SparseLRConfig") -> dict[str, Layer]:
    """What the config asks for, layer by layer. Needs shapes only: works on the meta device.

    Raises:
        ValueError: a pattern that matches nothing, a layer that fits neither pattern nor rank, experts that would
            stay dense, no layer left, distillation of a model that cannot have it.
    """
    if config.method == GIVEN:
        raise ValueError(
            f"method={GIVEN!r} marks decompositions that were made elsewhere: choose a method that solves, or refine "
            "what is there with hf_sparselr.refine"
        )
    _check_distillable(model, config)
    layers = linear_layers(model)
    for field in ("targets", "overrides"):
        for pattern in getattr(config, field) or ():
            if not any(matches(pattern, name) for name in layers):
                raise ValueError(f"{field}: {pattern!r} matches no layer; layers are {_shorten(layers)}")
    modules = [name for name, _ in model.named_modules()]
    for pattern in config.ignore or ():
        if not any(matches(pattern, name) for name in modules):
            raise ValueError(f"ignore: {pattern!r} matches no module; layers are {_shorten(layers)}")
    _reject_experts(model, config)
    plan, misfits = {}, []
    for name, layer in layers.items():
        if any(matches(pattern, name) for pattern in config.ignore or ()):
            continue
        if config.targets and not any(matches(pattern, name) for pattern in config.targets):
            continue
        settings = config.layer_settings(name, weight_shape(layer))
        if settings is None:
            continue
        problem = _misfit(name, weight_shape(layer), *settings)
        if problem:
            misfits.append(problem)
        else:
            plan[name] = Layer(name, *settings)
    if misfits and config.on_incompatible == "error":
        raise ValueError(
            f"{misfits[0]}{f' (and {len(misfits) - 1} more layers)' if len(misfits) > 1 else ''}; "
            'use overrides or ignore, or on_incompatible="skip" to leave such layers dense'
        )
    if misfits:
        logger.warning(f"{len(misfits)} layers stay dense: {'; '.join(misfits[:8])}")
    if not plan:
        raise ValueError(
            f"targets, ignore and overrides leave no layer to compress; layers are {_shorten(layers)}"
        )
    return plan


def _check_distillable(model: nn.Module, config: "SparseLRConfig") -> None:
    """Distillation compares logits, on one device, and may need text that the model writes."""
    if "distill" not in config.refine_steps:
        return
    kind, places = type(model).__name__, set(getattr(model, "hf_device_map", {}).values())
    if model.get_output_embeddings() is None and model.base_model is model:
        raise ValueError(
            f"refine={config.refine!r}: {kind} has no logits to distill; load it with its head (AutoModelForCausalLM "
            "or another), or leave distillation out"
        )
    if len(places) > 1:
        raise ValueError(
            f"refine={config.refine!r}: distillation trains {kind} on one device, but its device_map spreads it over "
            f"{', '.join(sorted(map(str, places)))}; load it on one"
        )
    if config.distill.self_samples and not writes_text(model):
        raise ValueError(
            f"distill.self_samples={config.distill.self_samples!r}: {kind} is no decoder that generates text; use 0"
        )


def _misfit(name: str, shape: tuple[int, int], pattern: Pattern, rank: int) -> str | None:
    if not pattern.fits(shape):
        return f"{name}: its {shape[1]} inputs do not divide into the groups of sparsity={str(pattern)!r}"
    if rank and rank >= min(shape):
        return f"{name}: rank={rank} must be smaller than both sides of its weight {shape[0]} x {shape[1]}"
    if not rank and not pattern.kept(shape):
        return f"{name}: a budget this small gives its weight {shape[0]} x {shape[1]} neither S nor a rank"
    return None


def _reject_experts(model: nn.Module, config: "SparseLRConfig") -> None:
    experts = {
        f"{stack}.{name}".removesuffix(".")
        for stack, blocks in find_stacks(model).items()
        for name, module in blocks.named_modules()
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        and not isinstance(module, nn.Conv1d)
    }
    left = [name for name in experts if not any(matches(pattern, name) for pattern in config.ignore or ())]
    if left:
        raise ValueError(
            f"experts stored as 3-D parameters are not supported yet: {_shorten(sorted(left))}; "
            "pass ignore=[...] with a pattern that covers them to leave them dense"
        )


def _shorten(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@dataclass
class Recording:
    """The calls of one stack of blocks.

    Attributes:
        inputs: the first block's hidden states, one tensor a batch.
        calls: calls[block][batch] = (args, kwargs) besides the hidden states.
    """

    inputs: list[torch.Tensor]
    calls: list[list[tuple[tuple, dict]]]


class _Recorded(Exception):  # noqa: N818 (not an error: ends a forward pass early)
    pass


def record_calls(model: nn.Module, blocks: nn.ModuleList, batches: list[torch.Tensor]) -> Recording:
    """Runs the model up to the blocks and records how it calls each of them.

    Blocks do not compute while recording: each hands its hidden states on, so the pass is cheap, and the pass ends
    at the last block. Where the model cannot live with that (it raises ValueError or TypeError, or a block does not
    receive what the one before it handed on), a real forward pass is recorded instead. All of it runs in FP32.

    Args:
        batches: token ids (batch, length), on the CPU.
    """
    recording = Recording([], [[] for _ in blocks])
    with _upcast(_halves_outside(model, blocks)), torch.no_grad():
        for ids in batches:
            marks = len(recording.inputs)
            try:
                _record(model, blocks, ids, recording, compute=False)
            except (ValueError, TypeError):
                del recording.inputs[marks:]
                for calls in recording.calls:
                    del calls[marks:]
                _record(model, blocks, ids, recording, compute=True)
    return recording


def _record(model, blocks, ids: torch.Tensor, recording: Recording, compute: bool) -> None:
    last = len(blocks) - 1
    handed_on = None

    def recorder(index: int, forward):
        def record(*args, **kwargs):
            nonlocal handed_on
            args, kwargs = _without_caches(args), _without_caches(kwargs)
            hidden, *args = args if args else (kwargs.pop("hidden_states"),)
            if index == 0:
                recording.inputs.append(hidden)
            elif not compute and hidden is not handed_on:
                raise TypeError("the model takes the outputs of its blocks apart")
            recording.calls[index].append((tuple(args), kwargs))
            if index == last:
                raise _Recorded
            if compute:
                with _upcast(_halves(blocks[index])):
                    return forward(hidden, *args, **kwargs)
            handed_on = hidden
            return hidden

        return record

    with instance_forwards(blocks, recorder):
        inputs = {"input_ids": ids.to(_input_device(model)), "use_cache": False}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        with suppress(_Recorded):
            model(**inputs)


@contextmanager
def instance_forwards(
    blocks: Sequence[nn.Module], make: Callable[[int, Callable], Callable]
) -> Iterator[None]:
    """Sets `forward` on every block to what `make` makes of its index and its own, and puts back what was there.

    (accelerate sets instance forwards too.)
    """
    before = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = make(index, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _halves(module: nn.Module) -> list[torch.Tensor]:
    tensors = (*module.parameters(), *module.buffers())
    return [tensor for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]


def _halves_outside(model: nn.Module, blocks: nn.ModuleList) -> list[torch.Tensor]:
    """Half-precision tensors around the blocks: in FP32, so are the masks and position embeddings they make."""
    skipped = {id(tensor) for tensor in _halves(blocks)}
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        skipped.add(id(output.weight))  # never reached, and large
    return [tensor for tensor in _halves(model) if id(tensor) not in skipped]


@contextmanager
def _upcast(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Turns tensors into FP32 in place, and puts back their own data."""
    kept = [(tensor, tensor.data) for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _without_caches(values):
    def scrub(value: Any) -> Any:
        return None if isinstance(value, Cache) else value

    if isinstance(values, dict):
        return {key: False if key == "use_cache" else scrub(value) for key, value in values.items()}
    return tuple(scrub(value) for value in values)


def _input_device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device


def replay(block: nn.Module, hidden: torch.Tensor, call: tuple[tuple, dict]) -> torch.Tensor:
    """Calls a block as it was recorded, on its own device and on hidden states in FP32; returns the new ones."""
    device = next(block.parameters()).device
    args, kwargs = placed(call, device)
    out = block(hidden.to(device).float(), *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def placed(values: Any, device: torch.device) -> Any:
    """Nested containers with every tensor in them on a device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, values)


def named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's parameters and buffers."""
    return [*module.named_parameters(), *module.named_buffers()]
