"""Sparsity patterns, such as "2:4" and 0.5, and the masks that obey them.

A pattern selects the entries of a score matrix that stay. The selected entries are the support. A kept value may
itself be 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

MAX_M = 32
COMPARE = ("row", "layer")  # where unstructured scores compete
SAMPLE = 2**20  # scores that are sorted to estimate a threshold
NEAR = 0.005  # relative distance from a guess within which a threshold is looked for first


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

    @classmethod
    def keeping(cls, kept: int, size: int) -> "Unstructured":
        """The pattern that keeps exactly `kept` of a layer's `size` entries."""
        zeros = size - kept
        return cls((zeros + 0.5 * (0 < zeros < size)) / size)  # the half: floor must not meet rounding

    def __str__(self) -> str:
        return f"{self.sparsity:g}"

    def fits(self, shape: tuple[int, int]) -> bool:
        return True

    def kept(self, shape: tuple[int, int]) -> int:
        size = shape[0] * shape[1]
        return size - math.floor(self.sparsity * size)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """The largest scores of the whole matrix: bool, exactly `kept(shape)` True."""
        return top_mask(scores, self.kept(scores.shape))

    def threshold(self, scores: torch.Tensor, guess: float | None = None) -> torch.Tensor:
        """The largest score that goes; all scores above it are kept.

        Ties with it go too, so fewer than `kept` may stay. On a GPU the threshold is estimated from a sample, without
        a host synchronisation: the number kept is off by about 1e-4 of the entries.

        Args:
            scores: float, any shape.
            guess: a threshold that is probably near, such as the one of the last iteration. On the CPU it saves
                most of the selection.

        Returns:
            (1,), in the dtype and on the device of the scores.
        """
        zeros = scores.numel() - self.kept(scores.shape)
        if not zeros:
            return scores.new_full((1,), -torch.inf)
        if scores.is_cuda:
            return sampled_threshold(scores, zeros)
        flat = scores.flatten()
        if guess is not None:
            low, high = guess * (1 - NEAR), guess * (1 + NEAR)
            below, inside = int(torch.count_nonzero(flat <= low)), flat[(flat > low) & (flat <= high)]
            if below < zeros <= below + len(inside):
                return inside.kthvalue(zeros - below, keepdim=True).values
        return flat.kthvalue(zeros, keepdim=True).values

    def allows(self, mask: torch.Tensor) -> bool:
        return int(mask.sum()) <= self.kept(mask.shape)


Pattern = NM | Unstructured

EMPTY = Unstructured(1.0)  # of methods without a sparse part


def parse(sparsity: str | float | None, field: str = "sparsity") -> Pattern:
    """Reads "n:m" (keep n of m) or the fraction of zeros in [0, 1).

    Raises:
        TypeError, ValueError: naming the field, the value and what is allowed.
    """
    allowed = f'"n:m" with 0 < n < m <= {MAX_M} (n of every m inputs are kept), or a fraction of zeros in [0, 1)'
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


def from_text(text: str) -> str | float:
    """The text of a command-line option as `parse` takes it: a number if it reads as one, else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def sampled_threshold(
    scores: torch.Tensor,
    zeros: int,
    size: int | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda sample: sample,
    add: Callable[[torch.Tensor], torch.Tensor] = lambda count: count,
) -> torch.Tensor:
    """Estimates the score (1,) that `zeros` scores do not exceed.

    The estimate comes from a sorted sample, and is corrected once by counting all scores.

    Args:
        scores: a layer's, or some rows of them if other processes have the others.
        size: number of scores of the whole layer.
        gather: this process's sample -> those of all processes, maybe with Inf beside them.
        add: the number of scores that this process counted -> that of all.
    """
    flat = scores.flatten()
    size = flat.numel() if size is None else size
    stride = size // SAMPLE | 1
    while math.gcd(stride, scores.shape[-1]) > 1:  # else some columns would be left out
        stride += 2
    sample = gather(flat[::stride]).sort().values
    last = -(-size // stride) - 1
    below = sample[min(zeros // stride, last)]
    surplus = add((flat <= below).sum()) - zeros
    index = (zeros - surplus).div(stride, rounding_mode="floor").clamp(0, last)
    return sample.index_select(0, index.view(1))  # indexing would synchronise


def top_mask(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` largest entries of the whole matrix: bool, same shape."""
    indices = torch.topk(scores.flatten(), kept, sorted=False).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return mask.index_fill_(0, indices, True).view(scores.shape)


def row_mask(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The largest entries of every row: bool, exactly `kept` True in total.

    Rows keep kept // out entries each; the remainder goes, one each, to the rows whose next entry is largest.

    Args:
        scores: (out, in) float, finite.
        kept: of out * in entries.
    """
    share, spare = divmod(kept, scores.shape[0])
    indices = torch.topk(scores, share, dim=1, sorted=False).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, indices, True)
    if spare:
        value, column = scores.masked_fill(mask, -torch.inf).max(dim=1)
        rows = torch.topk(value, spare, sorted=False).indices
        mask[rows, column[rows]] = True
    return mask


def compared_mask(scores: torch.Tensor, pattern: Pattern, compare: str) -> torch.Tensor:
    """The support of a pattern when unstructured scores compete within a "row" or within the whole "layer".

    Under N:M they compete within groups in any case. bool, exactly `pattern.kept` True.
    """
    if compare == "row" and isinstance(pattern, Unstructured):
        return row_mask(scores, pattern.kept(scores.shape))
    return pattern.mask(scores)


def project(dense: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest matrix (Frobenius norm) that obeys the pattern.

    Args:
        dense: (out, in) float.

    Returns:
        (projected, mask): the matrix with zeros outside the support, and the bool support.
    """
    mask = pattern.mask(dense.abs())
    return dense * mask, mask
