"""kernel="dense": S + B A beside the packed form, for as long as that stays as it is."""

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
    """S + B A (out, in), kept. Every call compares the packed form with a copy, so that no edit is missed, whatever
    it was made through: that costs more memory and, on a GPU, waits for it.

    Not within the capture of a CUDA graph, which would go on reading what is kept now: there, a new tensor.
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
