"""Convolutions with kernel 1 of a packed checkpoint: the skeleton gets linear layers where the files hold them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...compression.convolutions import pointwise_convolutions, put_linear
from ...compression.experts import compressible_layers
from ...format.checkpoint import Entry, group_layers
from .names import StoredNames

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put_packed_convolutions(model: "PreTrainedModel", entries: Mapping[str, Entry]) -> None:
    """Puts a `PointwiseConvolution` in the place of every convolution that is packed in the files.

    Args:
        model: a skeleton.
        entries: all tensors of the checkpoint.
    """
    if not pointwise_convolutions(model):
        return
    stored = group_layers(entries)
    tensors = {*model.state_dict(), *(f"{name}.weight" for name in compressible_layers(model))}
    names = StoredNames(model, tensors, entries, stored)
    put_linear(model, map(names.layer, stored))
