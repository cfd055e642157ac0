"""One pass over the calibration samples before the work: which blocks they reach, in which order, and how."""

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data.model_inputs import Sample, first_row
from .capture import (
    first_tensor,
    halves,
    halves_outside,
    in_fp32,
    instance_forwards,
    model_inputs,
    split_call,
)
from .model_structure import Stacks, output_layer


@dataclass
class Survey:
    """How a model calls its blocks.

    Attributes:
        order: the names of the blocks that are called, in the order of their first calls.
        most_calls: {block name: calls in one forward pass, at most}.
        chains: the names of the stacks whose blocks are called one after the other, each with the output of the one
            before it.
    """

    order: list[str] = field(default_factory=list)
    most_calls: dict[str, int] = field(default_factory=dict)
    chains: set[str] = field(default_factory=set)


class _Done(Exception):  # noqa: N818 (not an error: ends a forward pass early)
    pass


def survey_blocks(model: nn.Module, stacks: Stacks, batches: list[Sample]) -> Survey:
    """Runs the model on the first sample of each batch until all blocks were called.

    A block does not compute but hands its hidden states on. If the model fails then, a real pass is made. The model's
    output layer ends a pass.

    Raises:
        ValueError: the model fails on a sample in a real pass.
    """
    survey = Survey(chains=set(stacks))
    blocks = {name: block for members in stacks.values() for name, block in members.items()}
    with in_fp32(halves_outside(model, blocks)), torch.no_grad():
        for batch in batches:
            inputs = model_inputs(model, first_row(batch))
            try:
                calls = _calls(model, blocks, inputs, compute=False)
                _check_identity(stacks, calls)
            except Exception:  # a model may raise anything when its blocks return too little
                calls = _real_calls(model, blocks, inputs)
            _note(survey, stacks, calls)
            if len(survey.order) == len(blocks):
                break
    return survey


def _real_calls(model: nn.Module, blocks: dict[str, nn.Module], inputs: dict[str, Any]) -> "list[_BlockCall]":
    try:
        return _calls(model, blocks, inputs, compute=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own
        raise ValueError(
            f"{type(model).__name__} cannot be run on a calibration sample with {', '.join(sorted(inputs))} "
            f"({type(error).__name__}: {error}): expected dicts of the inputs that its forward method takes"
        ) from error


@dataclass
class _BlockCall:
    name: str
    hidden: torch.Tensor
    output: Any


def _calls(model: nn.Module, blocks: dict[str, nn.Module], inputs: dict[str, Any], compute: bool) -> list[_BlockCall]:
    """The calls of all blocks in one forward pass, in order."""
    calls: list[_BlockCall] = []
    names, members = list(blocks), list(blocks.values())

    def recorder(index: int, forward: Callable) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = split_call(args, kwargs)
            output = hidden
            if compute:
                with in_fp32(halves(members[index])):
                    output = forward(*args, **kwargs)
            calls.append(_BlockCall(names[index], hidden, first_tensor(output)))
            return output

        return record

    head = output_layer(model)

    def end(index: int, forward: Callable) -> Callable:
        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Done

        return stop

    heads = [] if head is None or any(part is head for block in members for part in block.modules()) else [head]
    with instance_forwards(members, recorder), instance_forwards(heads, end), suppress(_Done):
        model(**inputs)
    return calls


def _is_chain(members: list[str], calls: list[_BlockCall]) -> bool:
    """Whether calls are one of each of some members, in order, each with the output of the one before."""
    names = [call.name for call in calls]
    in_order = names == [name for name in members if name in names]
    return in_order and all(after.hidden is before.output for before, after in itertools.pairwise(calls))


def _check_identity(stacks: Stacks, calls: list[_BlockCall]) -> None:
    """Raises ValueError if a stack is no chain: in a pass without computing that may be an artefact."""
    for members in stacks.values():
        if not _is_chain(list(members), [call for call in calls if call.name in members]):
            raise ValueError("not a chain")


def _note(survey: Survey, stacks: Stacks, calls: list[_BlockCall]) -> None:
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.name] = counts.get(call.name, 0) + 1
    survey.order += [name for name in counts if name not in survey.order]
    for name, count in counts.items():
        survey.most_calls[name] = max(count, survey.most_calls.get(name, 0))
    for stack, members in stacks.items():
        own = [call for call in calls if call.name in members]
        if own and not _is_chain(list(members), own):
            survey.chains.discard(stack)
