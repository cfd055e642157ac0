"""x S^T + (x A^T) B^T + bias by a product that reads S dense, unpacked for the length of one call."""

import torch
from torch.nn import functional as F

from ..launch_config import Plan
from .decode import Packed
from .unpack import densify


def multiply_unpacked(inputs: torch.Tensor, layer: Packed, plan: Plan) -> torch.Tensor:
    """(rows, in) to (rows, out), by the plan's form (see `Plan`)."""
    mask, index, values, A, B, bias = layer
    if plan.form == "folded" or A is None:
        return F.linear(inputs, densify(mask, index, values, A, B), bias)
    y = F.linear(F.linear(inputs, A), B, bias)
    return y.addmm_(inputs, densify(mask, index, values).T)  # y is read where the larger product waits anyway
