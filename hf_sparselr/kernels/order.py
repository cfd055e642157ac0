"""Which weights are faster in the order of tiles than in that of rows."""

import torch

from ..utils.availability import TRITON
from .launch import drives
from .packed_weight import PackedWeight
from .support_index import count_bits
from .tile_order import fits_tiles

MEASURED = False  # until the kernels were
_FEWEST = 2**20  # entries of S


def may_suit_tiles(weight: PackedWeight) -> bool:
    """Whether there are kernels for a weight, by its shape, dtype and device; its support has a word in it, too."""
    values, out, ins = weight.values, weight.out_features, weight.in_features
    if not (MEASURED and TRITON and values.is_cuda and values.element_size() == 2 and values.is_floating_point()):
        return False
    if not fits_tiles(out, ins) or out * ins < _FEWEST:
        return False
    return torch.cuda.get_device_capability(values.device) == (9, 0) and drives()


def support_suits_tiles(weight: PackedWeight) -> bool:
    """Whether the kernels are the fastest for this support: 2:4 has its own. Waits for the device.

    A mask that keeps another number of values than there are is left to the kernels for rows, which say so.
    """
    kept, pairs = count_bits(weight.mask)
    return kept == weight.values.numel() and not pairs
