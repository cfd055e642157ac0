"""`method="precomputed"`: decompositions that were made elsewhere and refined by `hf_sparselr.refine`."""

from dataclasses import dataclass
from typing import Any

from ..format.decomposition import Decomposition


@dataclass(frozen=True)
class Options:
    """`method="precomputed"` has no options."""


def solve(*args: Any) -> Decomposition:
    raise ValueError('method="precomputed" has no solver')
