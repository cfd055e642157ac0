"""A packed model with FP32 masters of what distillation trains, and the dense model beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..config.options import DistillOptions
from ..format.bitmask import unpack, unpack_mask
from ..format.decomposition import Decomposition
from ..nn.linear import SparseLRLinear
from ..utils.modules import eval_mode, named_tensors
from .training_loop import Groups
from .working_linear import WorkingLinear, trainable


def unpack_masters(
    model: nn.Module, layers: dict[str, SparseLRLinear], device: torch.device, options: DistillOptions
) -> Groups:
    """Puts the model on the device with FP32 masters of the trained parameters, and returns these in groups."""
    if options.train == "all":
        for name, layer in layers.items():
            layer.to(device)
            mask = unpack_mask(layer.mask, layer.in_features)
            S = unpack(layer.mask, layer.values, layer.in_features)
            factors = (None, None) if layer.A is None else (layer.A.data, layer.B.data)
            hierarchy = None if layer.hierarchy is None else layer.hierarchy.detached()
            parts = Decomposition(S, mask, *factors, hierarchy=hierarchy)
            model.set_submodule(name, WorkingLinear(parts, layer.bias))
    groups = trainable(model) if options.train == "all" else _without_sparse(model, layers)
    trained = {id(parameter) for group in groups.values() for parameter in group}
    for _, tensor in named_tensors(model):
        own = id(tensor) in trained
        dtype = torch.float32 if own else _frozen_dtype(tensor, options)
        # A copy, so that the tensors that the model came with stay as they are.
        tensor.data = tensor.data.to(device, dtype, copy=own)
    return groups


def _frozen_dtype(tensor: torch.Tensor, options: DistillOptions) -> torch.dtype:
    """FP32, except where memory is short and autocast takes BF16 as it is."""
    if options.train == "factors" and options.precision == "bf16" and tensor.dtype == torch.bfloat16:
        return tensor.dtype
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


@torch.no_grad()
def round_masters(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Rounds to the stored dtypes but stays FP32: the last loss is then that of the stored model."""
    for name, tensor in named_tensors(model):
        if tensor.is_floating_point():
            packed = f"{name.removesuffix('S')}values"
            tensor.copy_(tensor.to(dtypes[name if name in dtypes else packed]))


def pack_masters(model: nn.Module, layers: dict[str, SparseLRLinear]) -> None:
    """Puts the packed layers back into the model, with the trained values."""
    for name, layer in layers.items():
        working = model.get_submodule(name)
        if working is layer:
            continue
        layer.values.data = working.S.detach()[working.mask]
        for own, trained in zip(layer.factors, working.factors, strict=True):
            own.data = trained.detach()
        if layer.bias is not None:
            layer.bias.data = working.bias.detach()
        model.set_submodule(name, layer)


def _without_sparse(model: nn.Module, layers: dict[str, SparseLRLinear]) -> Groups:
    """The groups of `trainable` for a model whose S stays packed."""
    values = {id(layer.values) for layer in layers.values()}
    return {
        "factors": [factor for layer in layers.values() for factor in layer.factors],
        "vectors": [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point() and id(p) not in values],
    }


@contextmanager
def on_device(teacher: nn.Module, device: torch.device, options: DistillOptions) -> Iterator[None]:
    """Inside, the dense model is on the device, frozen, in the precision that distillation needs; then as it was."""
    before = [(tensor, tensor.data, tensor.requires_grad) for _, tensor in named_tensors(teacher)]
    with eval_mode(teacher):
        try:
            for tensor, data, _ in before:
                tensor.requires_grad_(False)
                tensor.data = data.to(device, _frozen_dtype(data, options))
            yield
        finally:
            for tensor, data, flag in before:
                tensor.data = data
                tensor.requires_grad_(flag)


@contextmanager
def original_places(model: nn.Module) -> Iterator[None]:
    """After it, every tensor is where it was, in the dtype that it had."""
    places = [(tensor, tensor.device, tensor.dtype) for _, tensor in named_tensors(model)]
    try:
        yield
    finally:
        for tensor, device, dtype in places:
            tensor.data = tensor.data.to(device, dtype)
