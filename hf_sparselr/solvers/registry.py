"""The layer solvers by name. A solver's module is imported when it is first used: loading a checkpoint needs none."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the command line reads the names of the methods before it imports torch
    from types import ModuleType

    import torch

    from ..format.decomposition import Decomposition
    from ..format.patterns import Pattern
    from .gram import ScaledGram

PRECOMPUTED = "precomputed"  # of a checkpoint whose decompositions `hf_sparselr.refine` took from elsewhere


class Solve(Protocol):
    def __call__(
        self, weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Any, seed: int = 0
    ) -> Decomposition: ...


@dataclass(frozen=True)
class Method:
    """A layer solver.

    Attributes:
        module: below `hf_sparselr.solvers`; holds `solve` (see `Solve`), the dataclass of its options and, where layers
            with a common input are solved together, `solve_group`.
        options_name: of the dataclass.
        low_rank: whether it makes a low-rank part; otherwise rank must be 0.
        sparse: whether it makes a sparse part; otherwise sparsity must be None.
    """

    module: str
    options_name: str = "Options"
    low_rank: bool = True
    sparse: bool = True

    @property
    def options(self) -> type:
        return getattr(self._load(), self.options_name)

    @property
    def solve(self) -> Solve:
        return self._load().solve

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
        module = self._load()
        if hasattr(module, "solve_group"):
            return module.solve_group(weights, gram, patterns, ranks, options, seed)
        return [
            module.solve(weight, gram, pattern, rank, options, seed)
            for weight, pattern, rank in zip(weights, patterns, ranks, strict=True)
        ]

    def _load(self) -> ModuleType:
        return importlib.import_module(f".{self.module}", __package__)


METHODS: dict[str, Method] = {
    "3basil": Method("threebasil"),
    "oats": Method("oats"),
    "hassle-free-sparsegpt": Method("hassle_free", "SparseGPTOptions"),
    "hassle-free-alps": Method("hassle_free", "ALPSOptions"),
    "eora": Method("eora"),
    "sslc": Method("sslc"),
    "svd": Method("svd", sparse=False),
    "sparsegpt": Method("sparsegpt", low_rank=False),
    "alps": Method("alps", low_rank=False),
    "wanda": Method("wanda", low_rank=False),
    "magnitude": Method("magnitude", low_rank=False),
    PRECOMPUTED: Method("precomputed"),
}
