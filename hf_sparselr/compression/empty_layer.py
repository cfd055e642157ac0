"""Packed layers without data, for tensors that are read from files."""

import torch
from torch import nn

from ..format.checkpoint import Entry, layer_rank
from ..format.checkpoint_hierarchy import PREFIX, read_shape
from ..nn.hierarchical import HierarchicalLowRank
from ..nn.linear import SparseLRLinear
from .linear_layers import is_transposed, weight_shape


def empty_packed_layer(dense: nn.Module, parts: dict[str, Entry], dtype: torch.dtype) -> SparseLRLinear:
    """A packed layer on the meta device, with the shapes in a file, for the place of a dense one.

    Args:
        parts: of the layer, see `format.checkpoint.group_layers`.
    """
    layer = SparseLRLinear(
        *reversed(weight_shape(dense)),
        nonzeros=parts["values"].shape[0],
        rank=layer_rank(parts),
        bias=dense.bias is not None,
        transposed=is_transposed(dense),
        device="meta",
        dtype=dtype,
    )
    hierarchy = read_shape(parts, *weight_shape(dense))
    if hierarchy is not None:
        layer.hierarchy = HierarchicalLowRank(hierarchy, f"{PREFIX}.row_order" in parts, "meta", dtype)
    return layer
