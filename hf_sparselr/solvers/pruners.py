"""The pure pruners by name. Each is a method at rank 0, and the pruning step of methods with a low-rank part."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import alps, magnitude, sparsegpt, wanda
from .base import Repeated


@dataclass(frozen=True)
class Pruner:
    """A pruner in scaled coordinates and the dataclass of its options.

    Attributes:
        prune: (Wt, gram, pattern, options) -> (S, mask, stats), in the coordinates of `gram`. Wt (out, in) FP32 is
            W * gram.scale with zeros at dead inputs. S (out, in) FP32 is zero outside the bool mask. `stats` holds
            iterations, converged, objective = tr((Wt - S) G (Wt - S)^T) and entries of the pruner.
        options: the dataclass of the pruner's options.
        repeated: (gram, pattern, options) -> a function Wt -> (S, mask). It does as `prune` for one weight after
            another of the same shape, and computes only once the parts that depend on gram and pattern alone.
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
