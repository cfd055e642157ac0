"""Causal attention in FP32 whose heads share keys, in fewer passes over memory than torch takes.

torch has no fused kernel for it. Its general way writes all scores, also those beyond the diagonal, and goes over them
ten times. (Its fused kernel for heads with keys of their own sums gradients in changing order.)
"""

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PARTS = 4  # of the queries; a part sees the keys up to its end


class CausalAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` takes `causal_attention` for what that can do."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and len(args) == 3 and _fits(*args, **kwargs):
            return causal_attention(*args, scale=kwargs.get("scale"))
        return function(*args, **kwargs)


def _fits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    plain = attn_mask is None and not dropout_p and query.dtype == torch.float32
    return plain and is_causal and enable_gqa and query.ndim == 4 and query.shape[-2] == key.shape[-2]


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(Q K^T scale) V, each position seeing itself and those before it; differentiable.

    Args:
        query: (batch, heads, length, width).
        key, value: (batch, shared heads, length, width); heads is a multiple of theirs.
        scale: None is width^-1/2.
    """
    times, length = query.shape[1] // key.shape[1], query.shape[2]
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    key, value = (each.repeat_interleave(times, 1) for each in (key, value))
    step = -(-length // PARTS)
    outputs = []
    for first in range(0, length, step):
        last = min(first + step, length)
        hidden = torch.full((last - first, last), -torch.inf, device=query.device).triu_(first + 1)
        scores = query[:, :, first:last] @ key[:, :, :last].mT + hidden
        outputs.append(scores.softmax(-1) @ value[:, :, :last])
    return torch.cat(outputs, 2)
