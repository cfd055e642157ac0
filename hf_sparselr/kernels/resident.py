"""kernel="dense": keeps S + B A beside the packed form until that changes."""

import functools
import logging
from collections.abc import Callable

import torch

from .packed_weight import PackedWeight
from .tensor_cache import TensorCache, apart

logger = logging.getLogger(__name__)

# Copies of mask, values, A and B, and S + B A of them.
_RESIDENT: TensorCache[tuple[list[torch.Tensor], torch.Tensor]] = TensorCache()


def resident_weight(weight: PackedWeight, build: Callable[[PackedWeight], torch.Tensor]) -> torch.Tensor:
    """S + B A (out, in), kept. Every call compares the packed form with a copy, so that no edit is missed, however it
    was made. The copy takes memory, and the comparison waits for a GPU.

    While a CUDA graph is captured it returns a new tensor: the graph would go on reading the one that is kept now.
    """
    if weight.values.is_cuda and torch.cuda.is_current_stream_capturing():
        return build(weight)
    sources = [tensor.detach() for tensor in weight[:4] if tensor is not None]
    key = tuple((tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device) for tensor in sources)

    def make() -> tuple[list[torch.Tensor], torch.Tensor]:
        _say_once()
        return apart(lambda: ([tensor.clone() for tensor in sources], build(weight)), weight.values.device)

    def fits(kept: tuple[list[torch.Tensor], torch.Tensor]) -> bool:
        return all(map(torch.equal, kept[0], sources))

    return _RESIDENT.keep(key, sources, make, fits)[1]


@functools.cache
def _say_once() -> None:
    logger.warning("kernel='dense': S + B A of the packed layers stays in memory beside the packed form")
