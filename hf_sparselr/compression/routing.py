"""The rows that each expert gets: the tokens they come from, and the router's weights for the expert's output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..nn.packed_experts import ExpertStack

Hook = Callable[[torch.Tensor], None]


class RoutedCall:
    """The arguments of the last call of an experts module: hidden states, experts and weights of each token.

    Attributes:
        masks: of the current inputs, True at positions that are no padding.
        confirmed: the experts whose rows turned out to be the hidden states of their tokens, in our order.
    """

    def __init__(self) -> None:
        self.masks: tuple[torch.Tensor, ...] = ()
        self.hidden: torch.Tensor | None = None
        self.index: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self.confirmed: set[int] = set()

    def note(self, given: list[Any]) -> None:
        """Takes a call's arguments, by what they are: integers (tokens, k) are experts, floats like them weights."""
        self.confirmed = set()
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        whole = [tensor for tensor in tensors if tensor.ndim == 2 and not tensor.is_floating_point()]
        self.index = whole[0] if len(whole) == 1 else None
        alike = [tensor for tensor in floats if self.index is not None and tensor.shape == self.index.shape]
        self.weights = alike[0] if len(alike) == 1 else None
        self.hidden = floats[0].flatten(0, -2) if floats and floats[0].ndim > 1 else None

    def rows_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(tokens, weights (tokens, 1)) of an expert, in the order of a mask (k, tokens)."""
        if self.hidden is None or self.index is None or self.weights is None or len(self.hidden) != len(self.index):
            return None
        place, token = torch.where((self.index == expert).T)
        return token, self.weights[token, place, None]

    def confirm(self, expert: int, x: torch.Tensor) -> bool:
        """Whether the rows that a layer of an expert gets are the hidden states of its tokens, in our order."""
        rows = self.rows_of(expert)
        same = rows is not None and x.shape == (len(rows[0]), self.hidden.shape[1])
        if same and torch.equal(x, self.hidden[rows[0]]):
            self.confirmed.add(expert)
            return True
        return False

    def prepare(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """The rows of x that are no padding; if they come from confirmed rows, times the router's weights.

        Rows of zeros are left out: some modules give every expert all tokens, those of others times 0.
        """
        x = x[x.ne(0).any(-1)] if self.index is None else x
        first = self.confirm(expert, x)
        rows = self.rows_of(expert) if expert in self.confirmed else None
        if rows is None or len(rows[0]) != len(x):
            return x
        token, weights = rows
        if not first:
            x = x * weights.to(x.dtype)
        for mask in self.masks:
            if mask.numel() == len(self.hidden):
                return x[mask.to(x.device).flatten()[token]]
        return x


@contextmanager
def routed_rows(block: nn.Module, stack: str, hooks: dict[str, Hook]) -> Iterator[tuple[RoutedCall, dict[str, Hook]]]:
    """Hooks that get the inputs of experts' layers without padding, and those after another stack's layers weighted.

    The inputs of the first stack are hidden states, which several experts share: they are not weighted. Rows stay as
    they are where the module does not tell what its router chose, or picks rows in an order of its own.

    Args:
        stack: the name of an `ExpertStack` in the block.
        hooks: {name of one of its layers: hook}.

    Yields:
        The call, whose masks the caller sets, and the hooks to register, some of them on other stacks of the module.
    """
    parent, _, key = stack.rpartition(".")
    module, call = block.get_submodule(parent), RoutedCall()
    others = [name for name, child in module.named_children() if isinstance(child, ExpertStack) and name != key]

    def preparing(expert: int, hook: Hook) -> Hook:
        return lambda x: hook(call.prepare(expert, x))

    def confirming(expert: int) -> Hook:
        def hook(x: torch.Tensor) -> None:
            call.confirm(expert, x)

        return hook

    experts = {name: int(name.rpartition(".")[2]) for name in hooks}
    all_hooks = {name: preparing(experts[name], hook) for name, hook in hooks.items()}
    for other in others:
        for expert in experts.values():
            if expert >= len(module.get_submodule(other)):  # experts that have no such weight
                continue
            all_hooks[f"{parent}.{other}.{expert}".lstrip(".")] = confirming(expert)
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: call.note([*args, *kwargs.values()]), with_kwargs=True
    )
    try:
        yield call, all_hooks
    finally:
        handle.remove()
