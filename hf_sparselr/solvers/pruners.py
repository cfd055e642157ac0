"""The pure pruners by name: methods of their own at rank 0, and the prune step of methods with a low-rank part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..gram import ScaledGram
from ..patterns import Pattern
from . import alps, magnitude, sparsegpt, wanda
from .base import Decomposition, Repeated, scaled, unscale


@dataclass(frozen=True)
class Pruner:
    """A pruner in scaled coordinates and the dataclass of its options.

    Attributes:
        prune: (Wt, gram, pattern, options) -> (S, mask, stats), all in the coordinates of `gram`: Wt (out, in)
            FP32 is W * gram.scale with zeros at dead inputs, S (out, in) FP32 is zero outside the bool mask, and
            stats holds iterations, converged, objective = tr((Wt - S) G (Wt - S)^T) and the pruner's own.
        options: see the pruner's file.
        repeated: (gram, pattern, options) -> Wt -> (S, mask), `prune` for weights of one shape after another: what
            they have in common is made once.
    """

    prune: Callable[..., tuple[torch.Tensor, torch.Tensor, dict]]
    options: type
    repeated: Callable[..., Repeated] | None = None


PRUNERS: dict[str, Pruner] = {
    "sparsegpt": Pruner(sparsegpt.prune, sparsegpt.Options, sparsegpt.repeated),
    "alps": Pruner(alps.prune, alps.Options, alps.repeated),
    "wanda": Pruner(wanda.prune, wanda.Options),
    "magnitude": Pruner(magnitude.prune, magnitude.Options),
}


def pruning(name: str) -> Callable[..., Decomposition]:
    """The `Solve` of a pruner alone; its ValueError at a rank > 0 names the method that takes one."""
    pruner = PRUNERS[name]

    def solve(
        weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Any, seed: int = 0
    ) -> Decomposition:
        if rank:
            raise ValueError(
                f"rank={rank!r}: method={name!r} has no low-rank part, so rank must be 0; "
                f'method="eora", solver={{"pruner": "{name}"}} fits one after it'
            )
        Wt = scaled(weight, gram)
        S, mask, stats = pruner.prune(Wt, gram, pattern, options)
        result = unscale(S, mask, None, Wt - S, gram)
        result.stats = stats
        return result

    return solve
