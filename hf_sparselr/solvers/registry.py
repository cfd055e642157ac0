"""The layer solvers by name. A solver's module is imported on first use, so that loading a checkpoint imports none."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the command line reads the names of the methods before it imports torch
    from types import ModuleType

    import torch

    from ..format.decomposition import Decomposition
    from ..format.hierarchy import HierarchyShape
    from ..format.patterns import Pattern
    from ..utils.world import World
    from .gram import ScaledGram

PRECOMPUTED = "precomputed"  # the method in the config of a checkpoint that `hf_sparselr.refine` made
SAFE_SIZES = (2.0**-10, 2.0**12)  # of the largest scaled weight: squares of squares stay within FP32
OVERFLOW = 2.0**126  # a quarter of the largest FP32 number
QUADRATIC_STATS = ("objective", "scaled_error")


class Solve(Protocol):
    """What the module of a method offers as `solve`."""

    def __call__(
        self, weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Any, seed: int = 0
    ) -> Decomposition:
        """Decomposes one layer; reads its arguments, writes to none.

        Args:
            weight: W (out, in), any float dtype.
            gram: of the layer's inputs, on the same device.
            pattern: of S.
            rank: of B A; 0 for pure sparsity.
            options: the dataclass of the method's options.
            seed: for methods that draw random numbers.

        Returns:
            S, mask, A, B in the layer's own coordinates (not scaled), and `stats` with at least iterations, converged
            and objective = tr(E G E^T), E = (W - S - B A) * gram.scale.
        """


@dataclass(frozen=True)
class Method:
    """A layer solver.

    Attributes:
        module: its name below `hf_sparselr.solvers`. The module holds `solve` (see `Solve`), the dataclass of its
            options and, if layers with a common input are solved together, `solve_group`. If several processes can
            share the rows of a layer, `shares_rows` says with which options.
        options_name: of the dataclass.
        low_rank: whether it makes a low-rank part; otherwise rank must be 0.
        sparse: whether it makes a sparse part; otherwise sparsity must be None.
        hierarchical: whether its low-rank part may be a hierarchy; its module then holds `solve_hierarchical`.
    """

    module: str
    options_name: str = "Options"
    low_rank: bool = True
    sparse: bool = True
    hierarchical: bool = False

    @property
    def options(self) -> type:
        return getattr(self._load(), self.options_name)

    def solve(
        self, weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Any, seed: int = 0
    ) -> Decomposition:
        """Decomposes one layer, see `Solve` and `solve_group`."""
        return self.solve_group([weight], gram, [pattern], [rank], options, seed)[0]

    def solve_group(
        self,
        weights: list[torch.Tensor],
        gram: ScaledGram,
        patterns: list[Pattern],
        ranks: list[int],
        options: Any,
        seed: int,
        world: World | None = None,
    ) -> list[Decomposition]:
        """Decomposes layers that share `gram`, one of each per list, together where the method can.

        Very large and very small layers are solved in other units, a power of 4, so that nothing overflows: every
        method commutes with that, to the bit.

        Args:
            world: the processes that share the rows of every layer, for methods that can (`shares_rows`).

        Raises:
            ValueError: a weight holds NaN or Inf, or is so large that it overflows FP32 when it is scaled.
        """
        unit = _unit(weights, gram)
        if unit == 1:
            return self._solve(weights, gram, patterns, ranks, options, seed, world)
        weights = [weight.float() / unit for weight in weights]
        results = self._solve(weights, gram, patterns, ranks, options, seed, world)
        return [_in_unit(result, unit) for result in results]

    def shares_rows(self, options: Any) -> bool:
        """Whether several processes can share the rows of a layer."""
        module = self._load()
        return hasattr(module, "shares_rows") and module.shares_rows(options)

    def weighs_outputs(self, options: Any) -> bool:
        """Whether rows of W are scaled by the roots of weights for the errors of the layer's outputs."""
        return getattr(options, "weigh_outputs", False)

    def solve_hierarchical(
        self,
        weight: torch.Tensor,
        gram: ScaledGram,
        pattern: Pattern,
        shape: HierarchyShape,
        permutation: str | None,
        options: Any,
        seed: int = 0,
    ) -> Decomposition:
        """`solve` with a hierarchical low-rank part.

        Args:
            shape: how that is split.
            permutation: "rcm" or None.
        """
        unit = _unit([weight], gram)
        solve = self._load().solve_hierarchical
        if unit == 1:
            return solve(weight, gram, pattern, shape, permutation, options, seed)
        weight = weight.float() / unit
        return _in_unit(solve(weight, gram, pattern, shape, permutation, options, seed), unit)

    def _solve(
        self,
        weights: list[torch.Tensor],
        gram: ScaledGram,
        patterns: list[Pattern],
        ranks: list[int],
        options: Any,
        seed: int,
        world: World | None,
    ) -> list[Decomposition]:
        module = self._load()
        if world is not None:
            return module.solve_group(weights, gram, patterns, ranks, options, seed, world)
        if hasattr(module, "solve_group"):
            return module.solve_group(weights, gram, patterns, ranks, options, seed)
        return [
            module.solve(weight, gram, pattern, rank, options, seed)
            for weight, pattern, rank in zip(weights, patterns, ranks, strict=True)
        ]

    def _load(self) -> ModuleType:
        return importlib.import_module(f".{self.module}", __package__)


def _unit(weights: list[torch.Tensor], gram: ScaledGram) -> float:
    """1, or the power of 4 near the largest scaled weight where that is outside `SAFE_SIZES`."""
    scale = gram.scale.double().masked_fill(gram.dead, 0.0)
    largest = max(float((weight.abs().amax(0).double() * scale).max()) for weight in weights)
    if not math.isfinite(largest):
        raise ValueError("the layer's weight holds NaN or Inf")
    if largest > OVERFLOW:
        raise ValueError("the layer's weight times the size of its inputs overflows FP32")
    if largest == 0 or SAFE_SIZES[0] <= largest <= SAFE_SIZES[1]:
        return 1.0
    return 4.0 ** (math.frexp(largest)[1] // 2)


def _in_unit(result: Decomposition, unit: float) -> Decomposition:
    """A decomposition of W / unit as one of W."""
    result.S.mul_(unit)
    for factor in (result.A, result.B):
        if factor is not None:
            factor.mul_(math.sqrt(unit))
    if result.hierarchy is not None:
        result.hierarchy.scale_(unit)
    for name in QUADRATIC_STATS:
        if name in result.stats:
            result.stats[name] *= unit**2
    return result


METHODS: dict[str, Method] = {
    "3basil": Method("threebasil", hierarchical=True),
    "oats": Method("oats"),
    "hassle-free-sparsegpt": Method("hassle_free", "SparseGPTOptions"),
    "hassle-free-alps": Method("hassle_free", "ALPSOptions"),
    "eora": Method("eora"),
    "sslc": Method("sslc"),
    "svd": Method("svd", sparse=False, hierarchical=True),
    "shss": Method("shss", hierarchical=True),
    "sparsegpt": Method("sparsegpt", low_rank=False),
    "alps": Method("alps", low_rank=False),
    "wanda": Method("wanda", low_rank=False),
    "magnitude": Method("magnitude", low_rank=False),
    PRECOMPUTED: Method("precomputed"),
}
