"""Record how a model calls its blocks, and replay one block.

Nothing here names an architecture: the arguments come from a real call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..utils.modules import move_to_device


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


def capture_block_inputs(model: nn.Module, blocks: nn.ModuleList, batches: list[torch.Tensor]) -> Recording:
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
    args, kwargs = move_to_device(call, device)
    out = block(hidden.to(device).float(), *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out
