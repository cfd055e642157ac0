"""Convolutions with kernel 1 are linear layers: they are worked on as such, and stay so where they are packed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..nn.pointwise import PointwiseConvolution, as_linear, is_pointwise
from ..utils.modules import replace_module
from .model_structure import find_blocks, shared_tensors

LEAF = "linear"  # the name of the linear layer below that of the convolution


def pointwise_convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """The dense convolutions with kernel 1 inside the blocks, {dotted name: convolution}, each once.

    Those whose weight belongs to several modules are left out.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for block_name, block in find_blocks(model).items():
        for name, module in block.named_modules(prefix=block_name):
            if is_pointwise(module):
                found.setdefault(id(module), (name, module))
    shared = shared_tensors(model) if found else set()
    return {name: module for name, module in found.values() if id(module.weight) not in shared}


def convolutions_as_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that `put_linear` would make, {dotted name: layer}: new modules that share the weights."""
    return {f"{name}.{LEAF}": as_linear(module) for name, module in pointwise_convolutions(model).items()}


def put_linear(model: nn.Module, layers: Iterable[str]) -> None:
    """Puts a `PointwiseConvolution` in the place of every convolution that is one of the named layers."""
    wanted = set(layers)
    for name, module in pointwise_convolutions(model).items():
        if f"{name}.{LEAF}" in wanted:
            replace_module(model, module, PointwiseConvolution(module))


def restore_convolutions(model: nn.Module) -> None:
    """Puts convolutions in the place of those modules whose linear layer is dense."""
    for module in list(model.modules()):
        if isinstance(module, PointwiseConvolution) and type(module.linear) is nn.Linear:
            replace_module(model, module, module.to_convolution())


@contextmanager
def linear_convolutions(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Inside, convolutions among the named layers are linear. After it, those are that were packed."""
    put_linear(model, layers)
    try:
        yield
    finally:
        restore_convolutions(model)
