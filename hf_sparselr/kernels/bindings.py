"""Weights that were used before: the result of their checks, and the kernels that are ready for them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .packed_weight import PackedWeight
from .tensor_cache import TensorCache, version

_pointer, _size = torch.Tensor.data_ptr, torch.Tensor.numel
_ABSENT = torch.empty(0)
ON_CPU = ("CPU",)  # among the products of a binding, that for every number of rows

# x (..., in), its rows and the weights to (..., out) of each.
Product = Callable[[torch.Tensor, int, Sequence[PackedWeight]], list[torch.Tensor]]


class Binding:
    """Weights that were checked. Holds none of their memory.

    Attributes:
        sizes: of all tensors.
        versions: of the masks.
        dtype, device, in_features: of all weights; the device as its index, -1 for the CPU.
        products: `Program`s for their addresses, by the number of rows and what else they depend on.
        densify: writes S + B A of the first weight, once it was asked for.
        gradient: a `Program` of the gradient of x from that of the first weight's result, once it was asked for.
    """

    def __init__(self, weights: Sequence[PackedWeight], sizes: list, versions: list[int]) -> None:
        for weight in weights:
            weight.check()
        self.sizes, self.versions = sizes, versions
        self.dtype, self.device = weights[0].values.dtype, weights[0].values.get_device()
        self.in_features = weights[0].in_features
        self.products: dict[tuple, Any] = {}
        self.densify: Any = None
        self.gradient: Any = None

    def fits(self, inputs: torch.Tensor) -> bool:
        return (
            inputs.dtype == self.dtype
            and inputs.get_device() == self.device
            and inputs.dim() > 0
            and inputs.shape[-1] == self.in_features
        )


_BINDINGS: TensorCache[Binding] = TensorCache()


def tensors_of(weights: Sequence[PackedWeight]) -> list[torch.Tensor]:
    """The five tensors of each weight; an empty one stands for None."""
    return [_ABSENT if tensor is None else tensor for weight in weights for tensor in weight[:5]]


def binding_of(weights: Sequence[PackedWeight], tensors: list[torch.Tensor] | None = None) -> Binding:
    """Checks weights, or finds that these were checked and not changed in size or mask since.

    Args:
        tensors: `tensors_of` the weights, if they are at hand.

    Raises:
        ValueError, TypeError: see `PackedWeight.check`.
    """
    if tensors is None:
        tensors = tensors_of(weights)
    key = (weights[0].in_features, *map(_pointer, tensors))
    binding = _BINDINGS.get(key)
    sizes, versions = list(map(_size, tensors)), list(map(version, tensors[::5]))
    if binding is not None and binding.sizes == sizes and binding.versions == versions:
        return binding
    binding = Binding(weights, sizes, versions)
    return _BINDINGS.put(key, binding, [tensor for weight in weights for tensor in weight.tensors])
