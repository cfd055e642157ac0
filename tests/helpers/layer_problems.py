"""Random layers with Gram matrices of random inputs."""

import torch

from hf_sparselr.format.patterns import NM, Unstructured
from hf_sparselr.solvers.gram import ScaledGram

TWO_OF_FOUR = NM(2, 4)


PATTERNS = [TWO_OF_FOUR, NM(1, 4), NM(3, 8), NM(5, 7), *map(Unstructured, (0.0, 0.5, 0.7, 0.99))]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    out: int, n: int, seed: int = 0, tokens: int = 0, damping: tuple[float, float] = (0.005, 0.005)
) -> tuple[torch.Tensor, ScaledGram]:
    """A random layer with correlated inputs of different sizes."""
    tokens = tokens or 8 * n
    X = randn(tokens, n, seed=100 + seed) @ (torch.eye(n) + 0.5 * randn(n, n, seed=200 + seed) / n**0.5)
    X = (X + 0.5 * randn(tokens, 1, seed=300 + seed)) * torch.logspace(-1, 1, n, dtype=torch.float64)
    return randn(out, n, seed=seed).float(), ScaledGram((X.T @ X).float(), damping)


def diagonal_gram(*diagonal: float) -> ScaledGram:
    return ScaledGram(torch.diag(torch.tensor(diagonal)), (0.0, 0.0))
