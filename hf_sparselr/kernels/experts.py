"""The kernels for all experts of a stack at once, kept ready for their weights."""

import functools
import logging
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from ..utils.availability import TRITON
from .dispatch import asks_for_values
from .packed_weight import PackedWeight, check_count
from .support_index import index_of
from .tensor_cache import TensorCache, apart

if TYPE_CHECKING:
    from .cuda.experts import ExpertTable

logger = logging.getLogger(__name__)

_pointer = torch.Tensor.data_ptr
_requires_grad, _version = attrgetter("requires_grad"), attrgetter("_version")

# The versions of the masks, and the kernels, or None where there are none for these weights.
_TABLES: TensorCache[tuple[list[int], "ExpertTable | None"]] = TensorCache()


def expert_table(
    inputs: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    weights: Callable[[], list[PackedWeight]],
) -> "ExpertTable | None":
    """The kernels for weights, if they compute the product that is asked for. Takes the host as little time as may be.

    Args:
        inputs: x, of any rows.
        tensors: all of the weights', in one order.
        masks: of the weights, in their order.
        weights: makes the weights, one an expert.

    Returns:
        None where another way must be taken: on a CPU, for gradients, for experts that are not alike, under vmap, ...
    """
    if not TRITON or not inputs.is_cuda or not asks_for_values(inputs):
        return None
    if torch.is_grad_enabled() and any(map(_requires_grad, tensors)):
        return None
    try:
        key = tuple(map(_pointer, tensors))
    except TypeError:  # None in the place of a tensor that other weights have
        return None
    try:
        versions = list(map(_version, masks))
    except RuntimeError:  # tensors made in inference mode count no edits
        versions = []
    entry = _TABLES.get(key)
    if entry is None or entry[0] != versions:
        if torch.cuda.is_current_stream_capturing():
            return None
        entry = _TABLES.put(key, (versions, _build(weights())), tensors)
    table = entry[1]
    if table is None or table.dtype != inputs.dtype or table.device != inputs.device:
        return None
    return table


def _build(weights: list[PackedWeight]) -> "ExpertTable | None":
    from .cuda.experts import ExpertTable, supports
    from .cuda.nvrtc import CompileError

    for weight in weights:
        weight.check()
    if not weights[0].values.is_cuda or not all(tensor.is_contiguous() for w in weights for tensor in w.tensors):
        return None

    with torch.cuda.device_of(weights[0].values):
        if not supports(weights):
            return None
        for weight in weights:
            check_count(weight, index_of(weight.mask, weight.in_features).nonzeros)
        table = apart(lambda: ExpertTable(weights), weights[0].values.device)
        try:
            table.compile()
        except CompileError as error:
            _say_slow(str(error))
            return None
        return table


@functools.cache
def _say_slow(reason: str) -> None:
    logger.warning("experts are computed one by one, which is slower: %s", reason)
