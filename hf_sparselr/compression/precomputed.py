"""Decompositions that were made elsewhere: `refine` hands them to the pipeline, which then solves nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..format.decomposition import Decomposition

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Precomputed:
    """A model whose weights are already sparse, with its factors.

    Attributes:
        reference: the dense model with the same blocks. Refinement matches it, and errors are measured against it.
        factors: {layer name: (A (rank, in), B (out, rank))}. A layer that is not in it has rank 0.
    """

    reference: nn.Module
    factors: Mapping[str, Factors]

    def decomposition(self, name: str, weight: torch.Tensor) -> Decomposition:
        """The nonzeros of `weight` (out, in), FP32, as S, and the layer's factors."""
        A, B = self.factors.get(name, (None, None))
        if A is not None:
            A, B = A.to(weight), B.to(weight)
        return Decomposition(weight.contiguous(), weight != 0, A, B)
