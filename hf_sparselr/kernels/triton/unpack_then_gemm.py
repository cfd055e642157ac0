"""x S^T + (x A^T) B^T + bias by a product that reads S dense, unpacked for the length of one call."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..bindings import Product
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from .unpack import bind_densify


def bind_unpacked(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Product:
    """The product of one weight: by S + B A where the configuration joins them, else by S, B and A."""
    (weight,) = weights
    if config.joined or weight.A is None:
        densify = bind_densify(weight)

        def joined(inputs: torch.Tensor, _: int, weights: Sequence[PackedWeight]) -> list[torch.Tensor]:
            return [F.linear(inputs, densify(), weights[0].bias)]

        return joined
    densify = bind_densify(weight._replace(A=None, B=None))

    def beside(inputs: torch.Tensor, rows: int, weights: Sequence[PackedWeight]) -> list[torch.Tensor]:
        _, _, A, B, bias, ins = weights[0]
        x = inputs.view(rows, ins)
        y = F.linear(F.linear(x, A), B, bias)
        y.addmm_(x, densify().T)  # y is read where the larger product waits anyway
        return [y.view(*inputs.shape[:-1], -1)]

    return beside
