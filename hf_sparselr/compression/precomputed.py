"""Decompositions made elsewhere: what `refine` hands to the pipeline in the place of a solver."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..format.decomposition import Decomposition
from .plan import Layer

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Precomputed:
    """S in the place of the dense weights, B and A beside them.

    Attributes:
        reference: the dense model, with the same blocks: what refinement matches, and errors are measured against.
        plan: {layer name: layer}, with the pattern and the rank that were found.
        factors: {layer name: (A (rank, in), B (out, rank))}; a layer that is not in it has rank 0.
    """

    reference: nn.Module
    plan: dict[str, Layer]
    factors: Mapping[str, Factors]

    def decomposition(self, name: str, weight: torch.Tensor) -> Decomposition:
        """S, whose support are the nonzeros of `weight` (out, in), FP32, and the layer's factors."""
        A, B = self.factors.get(name, (None, None))
        if A is not None:
            A, B = A.to(weight), B.to(weight)
        return Decomposition(weight.contiguous(), weight != 0, A, B)
