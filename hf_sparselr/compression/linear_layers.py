"""Which modules count as linear layers, and how their weights are read.

The rest of the room sees weights as (out, in) matrices and does not ask which class a layer has.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b from a parameter `weight` and an optional `bias`, and nothing else.

    nn.Linear and Conv1D do. Any other class is asked to compute a small example: a subclass may have a forward of its
    own that does the same.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    with torch.device("cpu"):  # skeletons are built, and looked at, on the meta device
        return isinstance(module, nn.Linear | Conv1D) and _behaves_linearly(module)


def _behaves_linearly(module: nn.Module) -> bool:
    """Runs the module's own code on a small weight in place of its own, which may be large or on the meta device."""
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"} or list(module.children()):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, inputs = (torch.randn(shape, generator=generator) for shape in ((3, 5), (3,), (2, 5)))
    small = copy.copy(module)
    stored = weight.T.contiguous() if is_transposed(module) else weight
    small._parameters = {"weight": nn.Parameter(stored, requires_grad=False), "bias": None}
    small.in_features, small.out_features, small.nf, small.nx = 5, 3, 3, 5
    if module.bias is not None:
        small._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    expected = F.linear(inputs, weight, None if module.bias is None else bias)
    try:
        with torch.no_grad():
            found = type(module).forward(small, inputs)
    except Exception:  # a forward that fails with another shape is no plain product
        return False
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer stores its weight as (in, out)."""
    return isinstance(layer, Conv1D)


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    shape = tuple(layer.weight.shape)
    return shape[::-1] if is_transposed(layer) else shape


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, (out, in): a view without gradient."""
    weight = layer.weight.detach()
    return weight.T if is_transposed(layer) else weight


def set_dense_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Gives a layer another weight (out, in), which it shares."""
    layer.weight.data = weight.T if is_transposed(layer) else weight
