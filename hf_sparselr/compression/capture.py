"""Record how a model calls its blocks, and replay one block.

Nothing here names an architecture: the arguments come from a real call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..utils.modules import move_to_device, named_tensors

Call = tuple[tuple, dict]  # (args, kwargs) of a block, without its hidden states


@dataclass
class Recording:
    """The calls of one stack of blocks.

    Attributes:
        inputs: the first block's hidden states, one tensor a batch.
        calls: calls[block][batch] are the other arguments.
    """

    inputs: list[torch.Tensor]
    calls: list[list[Call]]


class _Recorded(Exception):  # noqa: N818 (not an error: ends a forward pass early)
    pass


def capture_block_inputs(model: nn.Module, blocks: nn.ModuleList, batches: list[torch.Tensor]) -> Recording:
    """Runs the model up to the blocks and records how it calls each of them, in FP32.

    The pass is cheap: a block does not compute but hands its hidden states on, and the last block ends it. Some models
    cannot live with that: they raise ValueError or TypeError, or a block does not receive the tensor that the one
    before it handed on. Then a real forward pass is recorded.

    Args:
        batches: token ids (batch, length), on the CPU.
    """
    recording = Recording([], [[] for _ in blocks])
    with _in_fp32(_halves_outside(model, blocks)), torch.no_grad():
        for ids in batches:
            try:
                inputs, calls = _record(model, blocks, ids, compute=False)
            except (ValueError, TypeError):
                inputs, calls = _record(model, blocks, ids, compute=True)
            recording.inputs.append(inputs)
            for all_calls, call in zip(recording.calls, calls, strict=True):
                all_calls.append(call)
    return recording


def _record(
    model: nn.Module, blocks: nn.ModuleList, ids: torch.Tensor, compute: bool
) -> tuple[torch.Tensor, list[Call]]:
    """One pass: the first block's hidden states and the call of every block."""
    first: list[torch.Tensor] = []
    calls: list[Call] = []
    handed_on: list[torch.Tensor] = []

    def recorder(index: int, forward: Callable) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = without_caches(args, kwargs)
            hidden, *args = args if args else (kwargs.pop("hidden_states"),)
            if index == 0:
                first.append(hidden)
            elif not compute and hidden is not handed_on[-1]:
                raise TypeError("the model takes the outputs of its blocks apart")
            calls.append((tuple(args), kwargs))
            if index == len(blocks) - 1:
                raise _Recorded
            if compute:
                with _in_fp32(_halves(blocks[index])):
                    return forward(hidden, *args, **kwargs)
            handed_on.append(hidden)
            return hidden

        return record

    with instance_forwards(blocks, recorder), suppress(_Recorded):
        model(**model_inputs(model, ids))
    return first[0], calls


def model_inputs(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """The arguments of a forward pass on token ids (batch, length). A decoder beside an encoder gets them too."""
    inputs = {"input_ids": ids.to(model.get_input_embeddings().weight.device), "use_cache": False}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


@contextmanager
def instance_forwards(
    blocks: Sequence[nn.Module], make: Callable[[int, Callable], Callable]
) -> Iterator[None]:
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


def _halves(module: nn.Module) -> list[torch.Tensor]:
    tensors = (tensor for _, tensor in named_tensors(module))
    return [tensor for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]


def _halves_outside(model: nn.Module, blocks: nn.ModuleList) -> list[torch.Tensor]:
    """Half-precision tensors around the blocks: in FP32, so are the masks and position embeddings they make."""
    skipped = {id(tensor) for tensor in _halves(blocks)}
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        skipped.add(id(output.weight))  # never reached, and large
    return [tensor for tensor in _halves(model) if id(tensor) not in skipped]


@contextmanager
def _in_fp32(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the tensors are FP32. After it they have their own data again."""
    kept = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def without_caches(args: tuple, kwargs: dict) -> Call:
    """Arguments without key-value caches, which would be filled by every replay."""

    def scrub(value: Any) -> Any:
        return None if isinstance(value, Cache) else value

    named = {key: False if key == "use_cache" else scrub(value) for key, value in kwargs.items()}
    return tuple(map(scrub, args)), named


def replay(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """Calls a block as it was recorded, on its own device and on hidden states in FP32; returns the new ones."""
    device = next(block.parameters()).device
    args, kwargs = move_to_device(call, device)
    out = block(hidden.to(device).float(), *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out
