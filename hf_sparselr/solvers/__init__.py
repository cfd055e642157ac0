"""Layer solvers: pure tensors in, `Decomposition` out. One file a method, one registry."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..gram import ScaledGram
from ..patterns import Pattern
from . import threebasil
from .base import Decomposition

__all__ = ["METHODS", "Decomposition", "Method"]


class Solve(Protocol):
    def __call__(
        self, weight: torch.Tensor, gram: ScaledGram, pattern: Pattern, rank: int, options: Any, seed: int = 0
    ) -> Decomposition: ...


@dataclass(frozen=True)
class Method:
    """A solver and the dataclass of its options."""

    solve: Solve
    options: type


METHODS: dict[str, Method] = {"3basil": Method(threebasil.solve, threebasil.Options)}
