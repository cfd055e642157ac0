"""What is known of weights that were used before: that they fit together, and the kernels that are ready for them."""

from collections.abc import Callable, Sequence

import torch

from .packed_weight import PackedWeight
from .tensor_cache import TensorCache, version

# x (..., in), its rows and the weights to (..., out) of each.
Product = Callable[[torch.Tensor, int, Sequence[PackedWeight]], list[torch.Tensor]]


class Binding:
    """Weights that were checked. Holds none of their memory.

    Attributes:
        layout: shapes and dtypes of all tensors.
        versions: of the masks.
        dtype, device, in_features: of all weights; the device as its index, -1 for the CPU.
        products: ready kernels for their addresses, by the number of rows and what else they depend on.
    """

    def __init__(self, weights: Sequence[PackedWeight], layout: list, versions: list[int]) -> None:
        for weight in weights:
            weight.check()
        self.layout, self.versions = layout, versions
        self.dtype, self.device = weights[0].values.dtype, weights[0].values.get_device()
        self.in_features = weights[0].in_features
        self.products: dict[tuple, Product] = {}

    def fits(self, inputs: torch.Tensor) -> bool:
        return (
            inputs.dtype == self.dtype
            and inputs.get_device() == self.device
            and inputs.dim() > 0
            and inputs.shape[-1] == self.in_features
        )


_BINDINGS: TensorCache[Binding] = TensorCache()


def binding_of(weights: Sequence[PackedWeight]) -> Binding:
    """Checks weights, or finds that these were checked and not changed in shape, dtype or mask since.

    Raises:
        ValueError, TypeError: see `PackedWeight.check`.
    """
    key, layout = [], []
    for mask, values, A, B, bias, in_features in weights:
        key += (mask.data_ptr(), values.data_ptr(), in_features)
        layout += (mask.shape, mask.dtype, values.shape, values.dtype)
        for tensor in (A, B, bias):
            if tensor is None:
                key.append(None)
            else:
                key.append(tensor.data_ptr())
                layout += (tensor.shape, tensor.dtype)
    key = tuple(key)
    versions = [version(weight.mask) for weight in weights]
    binding = _BINDINGS.get(key)
    if binding is None or binding.layout != layout or binding.versions != versions:
        binding = Binding(weights, layout, versions)
        _BINDINGS.put(key, binding, [tensor for weight in weights for tensor in weight.tensors])
    return binding
