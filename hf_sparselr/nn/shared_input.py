"""Packed layers that take the same input in one launch: q, k and v, gate and up, whatever a model calls them.

The model's own calls show which layers form a group: layers below one module that are called one after the other with
the same tensor. From then on the first of them computes the products of all, and the others find theirs ready. A group
that is called otherwise too often is dissolved.

Groups serve where nothing is differentiated. They do not serve inference mode, whose tensors do not show edits, nor
autocast. Under torch.compile they serve only if they were found before.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..kernels import PackedWeight, packed_linears
from ..kernels.fast_calls import FastCall, updated
from .linear import MOST_PREPARED, SparseLRLinear
from .packed_experts import ExpertStack

MOST_MISSES = 3  # calls in which a group was no group: an interrupted run may be one


class SharedInputGroup:
    """The packed layers below one module that take inputs of one width.

    Args:
        layers: in any order.
    """

    def __init__(self, layers: list[SparseLRLinear]) -> None:
        # Weak, because the layers refer to this object: a cycle would keep models from being freed at once.
        self.layers = [weakref.ref(layer) for layer in layers]
        # groups[i]: the layers that share layer i's input, if i is called first; None if there are none.
        self.groups: list[list[int] | None] = [None] * len(layers)
        self._misses = [0] * len(layers)
        self._forget()

    def _forget(self) -> None:
        self._ready: tuple[Any, ...] | None = None  # input, its state, computing layer, waiting outputs
        self._seen: Any = None  # the last input, weakly
        self._seen_state: tuple | None = None
        self._run: list[int] = []  # the layers that were called with it
        self._alone: dict[int, int] = defaultdict(int)  # calls of layers that are in no group
        self._fast: dict[int, FastCall] = {}  # by the first layer
        self._prepared = 0

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and files, without the parts that belong to one run."""
        layers = [layer() for layer in self.layers]
        return {"layers": layers, "groups": self.groups, "_misses": self._misses}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.layers = [_gone if layer is None else weakref.ref(layer) for layer in self.layers]
        self._forget()

    def __call__(self, layer: SparseLRLinear, inputs: torch.Tensor) -> torch.Tensor:
        """The product of one of the layers: x (..., in) to (..., out)."""
        compiling, number = torch.compiler.is_compiling(), layer.number
        # In one graph a tensor is a value; elsewhere it may be edited, or another stream may come.
        state = None if compiling else _state(inputs)
        ready = self._ready  # read once: another thread may run the model
        if ready is not None and self.layers[number]() is layer:
            known, its_state, first, outputs = ready
            if known is inputs and its_state == state and number in outputs and not _casts(inputs, compiling):
                output = outputs.pop(number)
                if not outputs:
                    self._ready = None
                return output
            self._ready = None
            self._misses[first] += 1
            if self._misses[first] == MOST_MISSES:
                self.groups[first] = None
        if self.layers[number]() is not layer:
            return layer.product(inputs)  # a shallow copy, with values of its own
        if not (compiling or _may_wait(inputs)):
            return self._product(layer, inputs, alone=True)
        if not compiling:
            self._give_up(number)
        group = self.groups[number]
        if group is None:
            if compiling:
                return layer.product(inputs)
            self._watch(number, inputs, state)
            return self._product(layer, inputs, alone=False)
        members = [self.layers[i]() for i in group]
        if not all(_is_at_hand(member, layer) for member in members):
            return layer.product(inputs)
        weights = [member.packed_weight for member in members]
        outputs = packed_linears(inputs, weights, layer.kernel)
        if not compiling:
            self._prepare(number, members, weights, inputs)
        self._ready = inputs, state, number, dict(zip(group[1:], outputs[1:], strict=True))
        return outputs[0]

    def _product(self, layer: SparseLRLinear, inputs: torch.Tensor, alone: bool) -> torch.Tensor:
        """Of one layer, prepared for C where it is in no group, or a group cannot be used.

        Args:
            alone: see `SparseLRLinear.prepare`.
        """
        out = layer.product(inputs)
        if not alone:
            self._alone[layer.number] += 1
        if alone or (
            self._alone[layer.number] > 1 and not any(layer.number in group for group in self.groups if group)
        ):
            layer.prepare(inputs, alone)
        return out

    def _prepare(
        self, first: int, members: list[SparseLRLinear], weights: list[PackedWeight], inputs: torch.Tensor
    ) -> None:
        """Lets C take the next such calls of a group."""
        if self._prepared > MOST_PREPARED:
            return
        old, parameters = self._fast.get(first), [member._parameters for member in members]
        fast = updated(old, weights, parameters, members[0].kernel, inputs)
        if fast is not None and fast is not old:
            self._fast[first] = fast
            self._prepared += 1
            members[0].fast_call = fast.call
            for member in members[1:]:
                member.fast_call = fast.take

    def _give_up(self, first: int) -> None:
        """Dissolves a group that C was called for otherwise too often."""
        fast = self._fast.get(first)
        if fast is not None and fast.misses >= MOST_MISSES:
            for number in self.groups[first] or ():
                layer = self.layers[number]()
                if layer is not None:
                    vars(layer).pop("fast_call", None)
            self.groups[first] = None
            self._misses[first] = MOST_MISSES
            del self._fast[first]

    def _watch(self, number: int, inputs: torch.Tensor, state: tuple) -> None:
        same = self._seen is not None and self._seen() is inputs and self._seen_state == state
        run = [*self._run, number] if same and number not in self._run else [number]
        self._seen, self._seen_state, self._run = weakref.ref(inputs), state, run
        if len(run) > 1 and self._misses[run[0]] < MOST_MISSES:
            self.groups[run[0]] = run


def _gone() -> None:
    """Stands for the reference to a layer that no longer existed when its group was copied."""


def link_shared_inputs(model: nn.Module) -> None:
    """Lets the packed layers of a model find out which of them share their input."""
    for layers in layers_by_width(model):
        group = SharedInputGroup(layers) if len(layers) > 1 else None
        for number, layer in enumerate(layers):
            layer.shared_input, layer.number = group, number
            vars(layer).pop("fast_call", None)


def layers_by_width(model: nn.Module) -> Iterator[list[SparseLRLinear]]:
    """The packed layers right below each module, by the width of their input: some of these may have the same."""
    for module in model.modules():
        if isinstance(module, ExpertStack):  # experts have inputs of their own
            continue
        widths = defaultdict(list)
        for child in module.children():
            if isinstance(child, SparseLRLinear):
                widths[child.in_features].append(child)
        yield from widths.values()


def _state(inputs: torch.Tensor) -> tuple | None:
    """What must not change between the calls of a group: the input's values, the stream; None in inference mode."""
    try:
        if inputs.is_cuda:
            return inputs._version, torch._C._cuda_getCurrentRawStream(inputs.get_device())
        return inputs._version, 0
    except RuntimeError:  # a tensor of inference mode
        return None


def _casts(inputs: torch.Tensor, compiling: bool) -> bool:
    return not compiling and torch.is_autocast_enabled("cuda" if inputs.is_cuda else "cpu")


def _may_wait(inputs: torch.Tensor) -> bool:
    """Whether products may be computed before they are asked for."""
    return not (inputs.is_inference() or torch.is_inference_mode_enabled() or _casts(inputs, False))


def _is_at_hand(member: SparseLRLinear | None, layer: SparseLRLinear) -> bool:
    """Whether a layer can be computed with another: not offloaded, not sharded by itself, of the same settings."""
    if member is layer:
        return True
    if member is None or member.kernel != layer.kernel:
        return False
    mine, other = layer._parameters.get("values"), member._parameters.get("values")
    if mine is None or other is None:
        return False
    return type(mine) is type(other) and mine.device == other.device and mine.dtype == other.dtype
