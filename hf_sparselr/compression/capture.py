"""Record how a model calls its blocks, and replay one block.

Nothing here names an architecture: the arguments come from a real call.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache

from ..data.model_inputs import Sample
from ..utils.modules import move_to_device, named_tensors
from .model_structure import find_blocks, input_embeddings, output_layer
from .padding import padding_masks

Keep = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class Call(NamedTuple):
    """The arguments of a block, without its hidden states.

    Attributes:
        args, kwargs: the others.
        keyword: the name under which the hidden states were passed, or None where they came first.
        masks: (rows, length) bool tensors, False at padding; see `padding`.
    """

    args: tuple
    kwargs: dict[str, Any]
    keyword: str | None = None
    masks: tuple[torch.Tensor, ...] = ()


@dataclass
class Recording:
    """The calls of a chain of blocks.

    Attributes:
        inputs: the first block's hidden states, one tensor a batch.
        calls: {block name: one call a batch}.
        batches: the indices of the batches that reached the blocks.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)


class BrokenChainError(Exception):
    """A block was not called once, after the one before it, with the tensor that this one returned."""


class _Recorded(Exception):  # noqa: N818 (not an error: ends a forward pass early)
    pass


def capture_block_inputs(
    model: nn.Module, blocks: dict[str, nn.Module], batches: list[Sample], keep: Keep = lambda tensors: tensors
) -> Recording:
    """Runs the model up to a chain of blocks and records how it calls each of them, in FP32.

    The pass is cheap: a block does not compute but hands its hidden states on, and the last block ends it. Some models
    do not allow that: they raise an error, or a block does not receive the tensor that the one before it handed on.
    Then a real forward pass is recorded.

    Args:
        keep: puts the hidden states of a batch where they wait.

    Raises:
        BrokenChainError: the blocks are no chain in a real forward pass.
    """
    recording, known = Recording(calls={name: [] for name in blocks}), {}
    with in_fp32(halves_outside(model, blocks)), torch.no_grad():
        for index, batch in enumerate(batches):
            try:
                found = _record_chain(model, blocks, batch, compute=False)
            except Exception:  # a model may raise anything when its blocks return too little
                found = _record_chain(model, blocks, batch, compute=True)
            if found is None:
                continue
            recording.inputs += keep([found[0]])
            recording.batches.append(index)
            for name, call in zip(blocks, _with_known_tensors(found[1], known), strict=True):
                recording.calls[name].append(call)
    return recording


def _with_known_tensors(calls: list[Call], known: dict[Any, list[torch.Tensor]]) -> list[Call]:
    """Calls with the tensors of earlier batches where theirs hold the same, as position embeddings do.

    Args:
        known: the last of these by shape, dtype and device; gets new ones.
    """
    found: dict[int, torch.Tensor] = {}

    def find(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in found:
            others = known.setdefault((value.shape, value.dtype, value.device), [])
            found[id(value)] = next((other for other in others if torch.equal(other, value)), value)
            if found[id(value)] is value:
                others[:] = [*others[-3:], value]
        return found[id(value)]

    return tree_map(find, calls)


def _record_chain(
    model: nn.Module, blocks: dict[str, nn.Module], batch: Sample, compute: bool
) -> tuple[torch.Tensor, list[Call]] | None:
    """One pass: the first block's hidden states and the call of every block; None if it reaches none of them."""
    first: list[torch.Tensor] = []
    calls: list[Call] = []
    handed_on: list[Any] = []
    names = list(blocks)
    inputs = model_inputs(model, batch)

    def recorder(index: int, forward: Callable) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            if index != len(calls) or (calls and hidden is not handed_on[-1]):
                raise BrokenChainError(f"{names[index]} does not take the output of the block before it")
            if index == 0:
                first.append(hidden)
            calls.append(call._replace(masks=padding_masks(model, names[index], inputs, hidden, call.kwargs)))
            if index == len(blocks) - 1:
                raise _Recorded
            if not compute:
                handed_on.append(hidden)
                return hidden
            with in_fp32(halves(blocks[names[index]])):
                outputs = forward(*args, **kwargs)
            handed_on.append(first_tensor(outputs))
            return outputs

        return record

    with instance_forwards(list(blocks.values()), recorder), suppress(_Recorded):
        model(**inputs)
    if calls and len(calls) < len(blocks):
        raise BrokenChainError(f"{names[len(calls)]} was not called")
    return (first[0], calls) if calls else None


def capture_calls(
    model: nn.Module, name: str, batches: list[Sample], once: bool
) -> tuple[list[torch.Tensor], list[Call], list[int]]:
    """All calls of one block in real forward passes in FP32: (hidden states, arguments, index of the batch) a call.

    Args:
        name: of the block.
        once: whether a pass calls the block once, and so may end there.
    """
    hidden_states: list[torch.Tensor] = []
    calls: list[Call] = []
    indices: list[int] = []
    block = model.get_submodule(name)
    blocks = find_blocks(model)

    def recorder(index: int, inputs: dict[str, Any]) -> Callable[[int, Callable], Callable]:
        def make(_: int, forward: Callable) -> Callable:
            def record(*args: Any, **kwargs: Any) -> Any:
                hidden, call = split_call(args, kwargs)
                hidden_states.append(hidden)
                calls.append(call._replace(masks=padding_masks(model, name, inputs, hidden, call.kwargs)))
                indices.append(index)
                if once:
                    raise _Recorded
                return forward(*args, **kwargs)

            return record

        return make

    with in_fp32(halves_outside(model, blocks)), torch.no_grad(), computing_in_fp32(list(blocks.values())):
        for index, batch in enumerate(batches):
            inputs = model_inputs(model, batch)
            with instance_forwards([block], recorder(index, inputs)), suppress(_Recorded):
                model(**inputs)
    return hidden_states, calls, indices


@contextmanager
def computing_in_fp32(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside, each block is in FP32 while it computes."""

    def make(index: int, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with in_fp32(halves(blocks[index])):
                return forward(*args, **kwargs)

        return run

    with instance_forwards(blocks, make):
        yield


def model_inputs(model: nn.Module, batch: Sample) -> dict[str, Any]:
    """The arguments of a forward pass on a batch: on the model's device, floats in FP32, without a cache.

    A decoder beside an encoder gets the encoder's token ids if the batch has none for it.
    """
    weight = getattr(input_embeddings(model), "weight", None)
    device = (next(model.parameters()) if weight is None else weight).device
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {key: value.to(device) for key, value in batch.items()}
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        for key in ("input_ids", "attention_mask"):
            if key in inputs and f"decoder_{key}" in accepted:
                inputs[f"decoder_{key}"] = inputs[key]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def check_arguments(model: nn.Module, samples: list[Sample]) -> None:
    """Raises ValueError if samples hold an input that neither the model's forward pass nor that of a part names.

    Many models hand arguments that they do not name on to their parts, where unknown ones are dropped.
    """
    kinds = {type(part): part for part in model.modules()}
    accepted = {name for part in kinds.values() for name in inspect.signature(part.forward).parameters}
    unknown = sorted({key for sample in samples for key in sample} - accepted)
    if unknown:
        expected = [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
        raise ValueError(
            f"calibration has the model input {unknown[0]!r}, which {type(model).__name__} does not take: expected "
            f"some of {', '.join(expected)}"
        )


@contextmanager
def instance_forwards(blocks: Sequence[nn.Module], make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """Temporarily replaces each block's forward with make(index, original forward)."""
    before = [vars(block).get("forward") for block in blocks]  # accelerate sets such attributes too
    for index, block in enumerate(blocks):
        block.forward = make(index, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def halves(module: nn.Module) -> list[torch.Tensor]:
    """The half-precision tensors of a module."""
    tensors = (tensor for _, tensor in named_tensors(module))
    return [tensor for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]


def halves_outside(model: nn.Module, blocks: dict[str, nn.Module]) -> list[torch.Tensor]:
    """Half-precision tensors around the blocks: in FP32, so are the masks and position embeddings they make."""
    skipped = {id(tensor) for block in blocks.values() for tensor in halves(block)}
    output, tokens = output_layer(model), input_embeddings(model)
    weight = getattr(output, "weight", None)
    if weight is not None and weight is not getattr(tokens, "weight", None):
        skipped.add(id(weight))  # never reached, and large
    return [tensor for tensor in halves(model) if id(tensor) not in skipped]


@contextmanager
def in_fp32(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the tensors are FP32. After it they have their own data again."""
    kept = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def split_call(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """A block's hidden states, and its other arguments without key-value caches, which replays would fill.

    The hidden states are the first argument. Where all are passed by name, they are `hidden_states`, or the first
    floating point tensor.
    """
    named = {key: False if key == "use_cache" else _without_cache(value) for key, value in kwargs.items()}
    if args:
        return args[0], Call(tuple(map(_without_cache, args[1:])), named)
    floats = [k for k, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    keyword = "hidden_states" if "hidden_states" in named else next(iter(floats), None)
    if keyword is None:
        raise TypeError(f"a block takes no tensor of hidden states, but {sorted(named)}")
    return named.pop(keyword), Call((), named, keyword)


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def first_tensor(outputs: Any) -> torch.Tensor:
    """The first tensor among a block's outputs: its hidden states."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    return next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))


def replay(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """Calls a block as it was recorded, on its own device and on hidden states in FP32; returns the new ones."""
    device = next(block.parameters()).device
    args, kwargs, keyword, _ = move_to_device(call, device)
    hidden = hidden.to(device)
    hidden = hidden.float() if hidden.is_floating_point() else hidden
    if keyword is not None:
        return first_tensor(block(*args, **{keyword: hidden}, **kwargs))
    return first_tensor(block(hidden, *args, **kwargs))
