"""Options of `low_rank="hss"`, as data."""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

from ..format.hierarchy import HierarchyShape
from ..solvers.registry import METHODS
from ..utils.validation import check_choice, check_integer, check_number

LOW_RANKS = ("flat", "hss")
PERMUTATIONS = (None, "rcm")
DEFAULT_DEPTH = 3
DEFAULT_REDUCTION = 2.0


@dataclass(frozen=True)
class HierarchyOptions:
    """Options of the hierarchical low-rank part (format/hierarchy.py).

    Attributes:
        depth: how often rows and columns are halved; 3 where None. 0 is the flat form.
        ranks: of the blocks beside the diagonal, level by level from the outermost, for all layers. None: the layer's
            `rank` at the first level, then less by `reduction`.
        reduction: the rank of a level divided by that of the next level inwards; 2 where None.
        smallest_leaf: layers whose leaves would have fewer rows or columns are split less often.
        permutation: "rcm" (reverse Cuthill-McKee, needs SciPy; on every layer that was measured its error was within
            3% of a random order's) or None.
    """

    depth: int | None = None
    ranks: tuple[int, ...] | None = None
    reduction: float | None = None
    smallest_leaf: int = 16
    permutation: str | None = None

    def __post_init__(self) -> None:
        check_integer("hierarchy.smallest_leaf", self.smallest_leaf, 1)
        check_choice("hierarchy.permutation", self.permutation, PERMUTATIONS)
        if self.ranks is None:
            object.__setattr__(self, "depth", DEFAULT_DEPTH if self.depth is None else self.depth)
            object.__setattr__(self, "reduction", DEFAULT_REDUCTION if self.reduction is None else self.reduction)
            check_integer("hierarchy.depth", self.depth, 0)
            check_number("hierarchy.reduction", self.reduction, 1)
            return
        self._check_ranks()

    def _check_ranks(self) -> None:
        if not isinstance(self.ranks, (list, tuple)) or not self.ranks:
            raise TypeError(f"hierarchy.ranks={self.ranks!r}: expected a list of integers, a level each")
        for rank in self.ranks:
            check_integer("hierarchy.ranks", rank, 1)
        object.__setattr__(self, "ranks", tuple(self.ranks))  # JSON gives lists
        if self.depth not in (None, len(self.ranks)):
            raise ValueError(
                f"hierarchy.depth={self.depth!r} contradicts hierarchy.ranks={list(self.ranks)!r}: leave one out"
            )
        if self.reduction is not None:
            raise ValueError(
                f"hierarchy.reduction={self.reduction!r} contradicts hierarchy.ranks={list(self.ranks)!r}: leave one "
                "out"
            )
        object.__setattr__(self, "depth", len(self.ranks))

    def shape(self, shape: tuple[int, int], rank: int) -> HierarchyShape | None:
        """How a layer (out, in) is split; None where it stays flat."""
        depth, reduction = self.depth or 0, self.reduction or 1.0
        while depth and min(shape) >> depth < self.smallest_leaf:
            depth -= 1
        if not depth:
            return None
        ranks = self.ranks or [max(1, math.floor(rank / reduction**level)) for level in range(depth)]
        return HierarchyShape(*shape, tuple(ranks[:depth]))


def check_installed(options: HierarchyOptions) -> None:
    """Raises ImportError where a permutation needs a package that is not installed."""
    if options.permutation == "rcm" and importlib.util.find_spec("scipy") is None:
        raise ImportError(
            'hierarchy.permutation="rcm" needs SciPy: pip install "hf_sparselr[hss]", or leave the permutation out'
        )


def resolve_low_rank(low_rank: str | None, method: str) -> str:
    """The form of the low-rank part. None becomes "hss" with method="shss", else "flat".

    Raises:
        ValueError: unknown, or a form that the method does not make.
    """
    resolved = low_rank or ("hss" if method == "shss" else "flat")
    check_choice("low_rank", resolved, LOW_RANKS)
    able = [name for name, details in METHODS.items() if details.hierarchical]
    if resolved == "hss" and method not in able:
        raise ValueError(f"low_rank='hss': method={method!r} makes flat factors only, expected {', '.join(able)}")
    if resolved == "flat" and method == "shss":
        raise ValueError("low_rank='flat': method='shss' makes a hierarchy, expected 'hss'")
    return resolved


def check_hierarchy(config: Any, method_options: Any) -> None:
    """Checks the other fields of a `SparseLRConfig` that has `low_rank="hss"`.

    Args:
        method_options: those of the config; None if it comes from config.json, where no solver is needed.

    Raises:
        ValueError: naming the field.
    """
    options: HierarchyOptions = config.hierarchy
    if config.compression is not None or config.allocation == "global":
        field = "allocation" if config.compression is None else "compression"
        raise ValueError(
            f"{field}={getattr(config, field)!r} chooses flat ranks: with low_rank='hss' pass sparsity and rank, or "
            "hierarchy={'ranks': [...]}"
        )
    if getattr(method_options, "form", None) == "textbook":
        raise ValueError(
            "low_rank='hss': the iteration as published (effort='published', or method_options form='textbook') has "
            "a flat low-rank part; expected form='one-product'"
        )
    fields = {"rank": config.rank}
    fields |= {f"overrides[{p!r}]['rank']": own["rank"] for p, own in config.overrides.items() if "rank" in own}
    for field, rank in fields.items():
        if rank < 1:
            raise ValueError(f"{field}={rank!r}: low_rank='hss' needs a first rank of at least 1")
        if options.ranks and rank != options.ranks[0]:
            raise ValueError(f"{field}={rank!r} contradicts hierarchy.ranks={list(options.ranks)!r}: leave one out")
