"""A convolution with kernel 1 as what it is: a linear layer over the channels of every position."""

import torch
from torch import nn

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution of torch with kernel 1, without groups and padding; any stride."""
    return (
        type(module) in KINDS
        and set(module.kernel_size) == {1}
        and module.groups == 1
        and not isinstance(module.padding, str)
        and not any(module.padding)
    )


class PointwiseConvolution(nn.Module):
    """Takes the place of a convolution with kernel 1: inputs (..., in, *positions), outputs (..., out, *positions).

    Attributes:
        linear: the layer that multiplies, dense or packed. It sees inputs (..., *positions, in).
        in_channels, stride, ...: as the convolution had them.
    """

    def __init__(self, convolution: nn.Module) -> None:
        """Args: convolution: see `is_pointwise`. Its weight is shared."""
        super().__init__()
        for name in _SETTINGS:
            setattr(self, name, getattr(convolution, name))
        self.kind = type(convolution)
        self.linear = as_linear(convolution)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        channels = -1 - len(self.stride)
        if max(self.stride) > 1:
            steps = (..., *(slice(None, None, step) for step in self.stride))
            inputs = inputs[steps]
        return self.linear(inputs.movedim(channels, -1)).movedim(-1, channels).contiguous()

    @property
    def weight(self) -> torch.Tensor:
        """(out, in, 1, ...), for code that reads it."""
        kernel = (..., *(None for _ in self.stride))
        return self.linear.weight[kernel]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.linear.bias

    def to_convolution(self) -> nn.Module:
        """The convolution again, with the weight of a dense `linear`, which it shares."""
        with torch.device("meta"):
            convolution = self.kind(
                self.in_channels, self.out_channels, self.kernel_size, self.stride, bias=self.bias is not None
            )
        for name in _SETTINGS:
            setattr(convolution, name, getattr(self, name))
        weight = self.linear.weight
        shape = (*weight.shape, *self.kernel_size)
        convolution.weight = nn.Parameter(weight.detach().view(shape), requires_grad=weight.requires_grad)
        convolution.bias = self.linear.bias
        return convolution.train(self.training)


def as_linear(convolution: nn.Module) -> nn.Linear:
    """The linear layer of a convolution with kernel 1. Its weight (out, in) is a view, its bias the same object."""
    weight = convolution.weight
    with torch.device("meta"):
        layer = nn.Linear(convolution.in_channels, convolution.out_channels, bias=False)
    layer.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=weight.requires_grad)
    layer.bias = convolution.bias
    return layer.train(convolution.training)
