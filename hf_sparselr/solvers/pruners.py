"""The pure pruners by name: methods of their own at rank 0, and the prune step of methods with a low-rank part."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import alps, magnitude, sparsegpt, wanda
from .base import Repeated


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
