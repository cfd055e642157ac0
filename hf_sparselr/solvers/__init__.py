"""Layer solvers: pure tensors in, `Decomposition` out. One file a method, one registry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..gram import ScaledGram
from ..patterns import Pattern
from . import eora, hassle_free, oats, sslc, svd, threebasil
from .base import Decomposition
from .pruners import PRUNERS, pruning

__all__ = ["GIVEN", "METHODS", "Decomposition", "Method"]

GIVEN = "given"  # the method of a checkpoint whose decompositions `hf_sparselr.refine` took from elsewhere


class Solve(Protocol):
    def __call__(
        self, weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Any, seed: int = 0
    ) -> Decomposition: ...


@dataclass(frozen=True)
class Method:
    """A solver and the dataclass of its options.

    Attributes:
        solve: one layer.
        options: the dataclass of its options.
        group: layers with a common input, together: lists of weights, patterns and ranks in, a list out.
        low_rank: whether it makes a low-rank part; otherwise rank must be 0.
        sparse: whether it makes a sparse part; otherwise sparsity must be None.
    """

    solve: Solve
    options: type
    group: Callable[..., list[Decomposition]] | None = None
    low_rank: bool = True
    sparse: bool = True

    def solve_group(
        self,
        weights: list[torch.Tensor],
        gram: ScaledGram,
        patterns: list[Pattern],
        ranks: list[int],
        options: Any,
        seed: int,
    ) -> list[Decomposition]:
        """Decomposes layers that share `gram`, one of each per list, together where the method can."""
        if self.group is not None:
            return self.group(weights, gram, patterns, ranks, options, seed)
        return [
            self.solve(weight, gram, pattern, rank, options, seed)
            for weight, pattern, rank in zip(weights, patterns, ranks, strict=True)
        ]


@dataclass(frozen=True)
class GivenOptions:
    """`method="given"` has no options."""


def _given(*args: Any) -> Decomposition:
    raise ValueError(f"method={GIVEN!r} has no solver")


METHODS: dict[str, Method] = {
    "3basil": Method(threebasil.solve, threebasil.Options, group=threebasil.solve_group),
    "oats": Method(oats.solve, oats.Options),
    "hassle-free-sparsegpt": Method(hassle_free.solve, hassle_free.SparseGPTOptions),
    "hassle-free-alps": Method(hassle_free.solve, hassle_free.ALPSOptions),
    "eora": Method(eora.solve, eora.Options),
    "sslc": Method(sslc.solve, sslc.Options),
    "svd": Method(svd.solve, svd.Options, sparse=False),
    **{name: Method(pruning(name), pruner.options, low_rank=False) for name, pruner in PRUNERS.items()},
    GIVEN: Method(_given, GivenOptions),
}
