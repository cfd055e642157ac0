"""The products of many experts with their rows of x in one launch, without asking the device who has which rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..utils.availability import TRITON
from .bindings import binding_of, tensors_of
from .dispatch import asks_for_values
from .override import chosen_kernel
from .packed_weight import PackedWeight, check_count
from .support_index import index_of

if TYPE_CHECKING:
    from .cuda.experts import ExpertTable

_KEY = ("experts",)  # among the ready products of weights


def grouped_product(
    inputs: torch.Tensor, weights: Sequence[PackedWeight], ends: torch.Tensor, kernel: str = "auto"
) -> torch.Tensor | None:
    """x S^T + (x A^T) B^T + bias, where every row of x has the weight of its expert.

    Args:
        inputs: x (rows, in), in the order of the experts.
        weights: one an expert.
        ends: int32 (experts,), for each expert the first row after its own. Rows after the last are not computed.
        kernel: as of `packed_linear`.

    Returns:
        (rows, out); None where there is no kernel for all experts at once.
    """
    with torch.cuda.device_of(inputs):
        table = _table(inputs, weights, kernel)
        return None if table is None else table.grouped(inputs, ends)


def selected_product(
    inputs: torch.Tensor, weights: Sequence[PackedWeight], ids: torch.Tensor, kernel: str = "auto"
) -> torch.Tensor | None:
    """`grouped_product` for few rows in any order, `ids` int64 (rows,) telling the expert of each.

    Returns:
        (rows, out); None where there is no such kernel, or rows should be brought into the order of their experts.
    """
    if 4 * len(inputs) > len(weights):  # rows of an expert would read its weight once each
        return None
    with torch.cuda.device_of(inputs):
        table = _table(inputs, weights, kernel)
        return None if table is None else table.selected(inputs, ids)


def _table(inputs: torch.Tensor, weights: Sequence[PackedWeight], kernel: str) -> "ExpertTable | None":
    """The kernels of these weights, if they can compute this product."""
    if torch.compiler.is_compiling() or not TRITON or not inputs.is_cuda or chosen_kernel(kernel) == "dense":
        return None
    tensors = tensors_of(weights)
    if not asks_for_values(inputs, tensors):
        return None
    binding = binding_of(weights, tensors)
    if not binding.fits(inputs):
        return None
    if _KEY not in binding.products:
        binding.products[_KEY] = _build(weights)
    return binding.products[_KEY]


def _build(weights: Sequence[PackedWeight]) -> "ExpertTable | None":
    from .cuda.experts import ExpertTable, supports

    if torch.cuda.is_current_stream_capturing() or not supports(weights):
        return None
    for weight in weights:
        check_count(weight, index_of(weight.mask, weight.in_features).nonzeros)
    return ExpertTable(weights)
