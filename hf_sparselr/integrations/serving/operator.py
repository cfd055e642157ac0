"""The product of all packed layers behind one merged layer of an engine (q, k and v; gate and up)."""

from collections.abc import Sequence

import torch

from ...kernels import PackedWeight, packed_linears
from ...kernels.launch_config import FEW_ROWS, MOST_ROWS

_POWERS = MOST_ROWS.bit_length()


@torch.library.custom_op("hf_sparselr::merged_linear", mutates_args=())
def merged_linear(
    inputs: torch.Tensor,
    masks: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor | None],
    B: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    in_features: int,
) -> torch.Tensor:
    """[x W_0^T, x W_1^T, ...] + bias with W_i = S_i + B_i A_i, opaque to torch.compile. Not differentiable.

    Args:
        inputs: x (..., in).
        masks, values, A, B: of each layer, as in `kernels.PackedWeight`.
        bias: (sum of outs,) or None.
        in_features: in.

    Returns:
        (..., sum of outs).
    """
    sizes = [len(mask) for mask in masks]
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    parts = zip(masks, values, A, B, biases, strict=True)
    outs = packed_linears(inputs, [PackedWeight(*part, in_features) for part in parts])
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


@merged_linear.register_fake
def _(inputs, masks, values, A, B, bias, in_features):
    return inputs.new_empty((*inputs.shape[:-1], sum(mask.shape[0] for mask in masks)))


def warm_up(
    masks: Sequence, values: Sequence, A: Sequence, B: Sequence, bias: torch.Tensor | None, in_features: int
) -> None:
    """Makes kernels ready for every number of rows, with and without the bias: nothing can be built, measured or
    compiled while a CUDA graph is captured."""
    rows = [1, 2]  # on a CPU only these numbers of rows make a difference
    if values[0].is_cuda:
        rows = [*range(1, FEW_ROWS + 1), *(1 << power for power in range(FEW_ROWS.bit_length(), _POWERS))]
    for count in rows:
        x = values[0].new_zeros(count, in_features)
        for given in dict.fromkeys((None, bias)):
            merged_linear(x, masks, values, A, B, given, in_features)
