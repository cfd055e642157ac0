"""Sparsity patterns: what "2:4" and 0.5 mean, and the nearest matrix that obeys them.

A pattern selects the entries of a score matrix that stay. The selected entries are the support; a kept
value may itself be 0.0.
"""

import math
from dataclasses import dataclass

import torch

MAX_M = 32


@dataclass(frozen=True)
class NM:
    """Keeps at most `n` of every `m` consecutive inputs of an output row: "n:m"."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def fits(self, shape: tuple[int, int]) -> bool:
        return shape[1] % self.m == 0

    def kept(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] // self.m * self.n

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """The `n` largest of every group of `m`; ties go to the lower index.

        Args:
            scores: (..., in) float, `in` divisible by m.

        Returns:
            bool, same shape, exactly n True per group.
        """
        members = scores.unflatten(-1, (-1, self.m)).unbind(-1)
        ranks = [torch.zeros_like(members[0], dtype=torch.int8) for _ in members]
        for j in range(1, self.m):  # m(m-1)/2 comparisons: cheaper than sorting small groups
            for i in range(j):
                first_wins = members[i] >= members[j]
                ranks[j] += first_wins
                ranks[i] += ~first_wins
        return torch.stack([rank < self.n for rank in ranks], dim=-1).flatten(-2)

    def allows(self, mask: torch.Tensor) -> bool:
        """Whether a support obeys the pattern: at most n entries in every group."""
        return bool((mask.unflatten(-1, (-1, self.m)).sum(-1) <= self.n).all())


@dataclass(frozen=True)
class Unstructured:
    """Sets exactly floor(sparsity * out * in) entries of a layer to zero."""

    sparsity: float

    def __str__(self) -> str:
        return f"{self.sparsity:g}"

    def fits(self, shape: tuple[int, int]) -> bool:
        return True

    def kept(self, shape: tuple[int, int]) -> int:
        size = shape[0] * shape[1]
        return size - math.floor(self.sparsity * size)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """The largest scores of the whole matrix: bool, exactly `kept(shape)` True."""
        kept = torch.topk(scores.flatten(), self.kept(scores.shape), sorted=False).indices
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        return mask.index_fill_(0, kept, True).view(scores.shape)

    def allows(self, mask: torch.Tensor) -> bool:
        return int(mask.sum()) <= self.kept(mask.shape)


Pattern = NM | Unstructured


def parse(sparsity: str | float, field: str = "sparsity") -> Pattern:
    """Reads "n:m" (keep n of m) or the fraction of zeros in [0, 1).

    Raises:
        TypeError, ValueError: naming the field, the value and what is allowed.
    """
    allowed = (
        f'"n:m" with 0 < n < m <= {MAX_M} (n of every m inputs are kept), or a fraction of zeros in [0, 1)'
    )
    if isinstance(sparsity, bool) or not isinstance(sparsity, (str, int, float)):
        raise TypeError(f"{field}={sparsity!r}: expected {allowed}")
    if isinstance(sparsity, str):
        n, colon, m = sparsity.partition(":")
        if not (colon and n.strip().isdecimal() and m.strip().isdecimal()):
            raise ValueError(f"{field}={sparsity!r}: expected {allowed}")
        if not 0 < int(n) < int(m) <= MAX_M:
            raise ValueError(f"{field}={sparsity!r}: expected {allowed}")
        return NM(int(n), int(m))
    if not 0 <= sparsity < 1:
        raise ValueError(f"{field}={sparsity!r}: expected {allowed}")
    return Unstructured(float(sparsity))


def project(dense: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest matrix (Frobenius norm) that obeys the pattern.

    Args:
        dense: (out, in) float.

    Returns:
        (projected, mask): the matrix with zeros outside the support, and the bool support.
    """
    mask = pattern.mask(dense.abs())
    return dense * mask, mask
