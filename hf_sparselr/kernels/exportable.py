"""The product in operators that exporters translate: torch.onnx.export(dynamo=True) meets no operator of ours."""

import torch
from torch.nn import functional as F

from .packed_weight import PackedWeight


def exportable_linear(inputs: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x S^T + (x A^T) B^T + bias, (..., in) to (..., out). S is stored packed: a runtime that folds constants unpacks
    it once."""
    out = F.linear(inputs, _unpack(weight), weight.bias)
    return out if weight.A is None else out + F.linear(F.linear(inputs, weight.A), weight.B)


def _unpack(weight: PackedWeight) -> torch.Tensor:
    mask, values, *_, in_features = weight
    # A table, as shifts of uint8 are translated wrongly (torch 2.13: the result is int8).
    table = torch.tensor([[byte >> place & 1 for place in range(8)] for byte in range(256)], device=mask.device)
    kept = table.index_select(0, mask.flatten().int()).view(len(mask), -1)[:, :in_features].flatten()
    padded = torch.cat([values.new_zeros(1), values])  # place 0 is for entries that are not kept
    return padded.index_select(0, kept.cumsum(0) * kept).view(len(mask), in_features)
