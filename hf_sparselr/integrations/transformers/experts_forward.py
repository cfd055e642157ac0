"""Runs an experts module whose experts are packed on a GPU in few launches, in transformers' experts interface.

transformers brings tokens into the order of their experts, multiplies, and adds up, by about 20 operators. Its
"grouped_mm" and "batched_mm" do the same with packed experts, and stay what runs for gradients, on a CPU and for dense
experts. Where only values are asked for, this takes their place.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from ...nn.packed_experts import ExpertStack

if TYPE_CHECKING:
    from ...kernels.cuda.experts import ExpertTable

NAMES = ("grouped_mm", "batched_mm")
_DEFAULT_GATE = getattr(moe, "_default_apply_gate", None)


def install() -> None:
    """Puts `run` in front of transformers' functions, which stay what runs other experts."""
    for name in NAMES:
        function = moe.ALL_EXPERTS_FUNCTIONS[name]
        if not isinstance(function, functools.partial):
            moe.ALL_EXPERTS_FUNCTIONS[name] = functools.partial(_run_or, function)


def _run_or(function: Callable, experts: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    down = getattr(experts, "down_proj", None)
    out = None
    if isinstance(down, ExpertStack):
        out = (_run_untraced if torch.compiler.is_compiling() else run)(experts, *args, **kwargs)
    return function(experts, *args, **kwargs) if out is None else out


def run(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor | None:
    """The output of an experts module, (tokens, n).

    Args:
        hidden_states: (tokens, n).
        top_k_index, top_k_weights: (tokens, k), the experts of each token and their weights.

    Returns:
        None where the module must run as transformers has it.
    """
    hidden, first = hidden_states, getattr(experts, "gate_up_proj" if experts.has_gate else "up_proj", None)
    if not isinstance(first, ExpertStack) or not hidden.is_cuda or hidden.ndim != 2 or not hidden.numel():
        return None
    if getattr(experts, "_is_expert_parallel", False):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (top_k_weights, *experts.parameters())):
        return None
    up, down = first.table(hidden), experts.down_proj.table(hidden)
    if up is None or down is None or hidden.shape[1] != up.ins or not up.takes(top_k_index.numel()):
        return None
    with torch.cuda.device_of(hidden):
        return _multiply(experts, hidden, top_k_index, top_k_weights, up, down)


_run_untraced = torch.compiler.disable(run)


def _multiply(
    experts: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: "ExpertTable",
    down: "ExpertTable",
) -> torch.Tensor:
    from ...kernels.gpu import ready
    from ...kernels.triton.routing import combine, gather, order_pairs, silu_gate

    rows = index.numel()
    tokens, places, ends = order_pairs(ready(index.long()), up.experts)
    bias = _Bias(experts, ends, rows) if experts.has_bias else None
    y = up.grouped(gather(ready(hidden), tokens, up.room(rows)), ends)
    if bias is not None:
        y += bias("gate_up_proj_bias" if experts.has_gate else "up_proj_bias")
    room = down.room(rows)
    if not experts.has_gate:
        x = experts.act_fn(y)
    elif (
        isinstance(getattr(experts, "act_fn", None), nn.SiLU | SiLUActivation)
        and getattr(type(experts), "_apply_gate", None) is _DEFAULT_GATE
    ):
        x, room = silu_gate(y, room), 0
    else:
        x = experts._apply_gate(y)
    y = down.grouped(F.pad(x, (0, room)) if room else x, ends)
    if bias is not None:
        y += bias("down_proj_bias")
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    return combine(ready(y), places, ready(weights)).to(hidden.dtype)


class _Bias:
    """The biases of an experts module for rows in the order of their experts."""

    def __init__(self, experts: nn.Module, ends: torch.Tensor, rows: int) -> None:
        self.experts = experts
        self.ids = torch.searchsorted(ends, torch.arange(rows, device=ends.device, dtype=ends.dtype), right=True)

    def __call__(self, name: str) -> torch.Tensor:
        return getattr(self.experts, name)[self.ids]
