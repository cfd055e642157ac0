"""A layer S + B A in FP32 while its block, or the whole model, is trained."""

import torch
from torch import nn
from torch.nn import functional as F

from ..format.decomposition import Decomposition


class WorkingLinear(nn.Module):
    """S + B A of one layer in FP32 while its block is at work.

    S is dense with zeros; its gradient is masked, so Adam never moves an entry outside the support.
    """

    def __init__(self, decomposition: Decomposition, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.S = nn.Parameter(decomposition.S)
        self.A = None if decomposition.A is None else nn.Parameter(decomposition.A)
        self.B = None if decomposition.B is None else nn.Parameter(decomposition.B)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float())
        self.register_buffer("mask", decomposition.mask)
        self.S.register_hook(lambda grad: grad * self.mask)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """S + B A, cheaper than two thin products with as many inputs as training has. Some blocks read it (T5)."""
        return self.S if self.A is None else self.S + self.B @ self.A

    def decomposition(self) -> Decomposition:
        factors = (None, None) if self.A is None else (self.A.detach(), self.B.detach())
        return Decomposition(self.S.detach(), self.mask, *factors)


def trainable(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What refinement trains: "S" of every `WorkingLinear`, its "factors", and "vectors" (norms and biases)."""
    layers = [layer for layer in module.modules() if isinstance(layer, WorkingLinear)]
    return {
        "S": [layer.S for layer in layers],
        "factors": [factor for layer in layers if layer.A is not None for factor in (layer.A, layer.B)],
        "vectors": [p for p in module.parameters() if p.ndim == 1 and p.is_floating_point()],
    }
