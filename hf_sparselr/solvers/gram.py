"""Gram matrices of layer inputs: accumulation, damping, scaling, factorisation.

The layer problem measures an error E (out, in) by tr(E H E^T) with H = X^T X over the calibration inputs X. Solvers
work on `ScaledGram`: H damped and scaled to a unit diagonal, shared by all layers that see the same input.
"""

import itertools
import math
from functools import cached_property

import torch

from ..utils.precision import add_bf16_product, matmuls, product

KEPT_INVERSES = 2**25  # entries in all, 128 MiB
SMALL_SHIFT = 0.03  # of rho, as a share
SMALL_TRIANGLE = 512  # that one kernel inverts fast enough
SPLIT, PARTS = 8192, 4  # from this size on a symmetric product is made of so many row parts


class GramAccumulator:
    """Sums X^T X over batches in FP32. BF16 inputs on CUDA are multiplied in BF16: their products are exact in FP32.

    Args:
        in_features: number of inputs n.
        device: where the n x n sum lives.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._lower = False  # whether blocks above the diagonal are missing
        self.rows = 0

    @property
    def gram(self) -> torch.Tensor:
        """X^T X (n, n)."""
        if self._lower:
            _mirror(self._sum)
            self._lower = False
        return self._sum

    def add(self, inputs: torch.Tensor) -> None:
        """Adds one batch of inputs (..., n), any float dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self.gram.device)
        if rows.is_cuda and rows.dtype == torch.bfloat16:
            for own, until in _lower_parts(len(self.gram)):
                add_bf16_product(self.gram[own, until], rows[:, own].T, rows[:, until])
            self._lower = True
        else:
            rows = rows.float()
            self.gram.addmm_(rows.T, rows)
        self.rows += rows.shape[0]


class ScaledGram:
    """A damped Gram matrix in coordinates where its diagonal is one.

    H <- H + damping[0] diag(H) + damping[1] mean(diag H) I; s = sqrt(diag H); G = H / (s s^T). A dead input
    (zero diagonal) gets 1 on the diagonal before damping; solvers set its weights to zero.

    Args:
        gram: (n, n) H, FP32.
        damping: (relative to each diagonal entry, relative to their mean), both >= 0.

    Attributes:
        matrix: (n, n) G.
        scale: (n,) s. A weight W in these coordinates is W * s, so |W * s| is the Wanda score.
        dead: (n,) bool.

    Raises:
        ValueError: `gram` holds NaN or Inf, or the mean of its diagonal overflows FP32.
    """

    def __init__(self, gram: torch.Tensor, damping: tuple[float, float] = (0.005, 0.005)) -> None:
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("the Gram matrix of the layer's inputs holds NaN or Inf")
        gram = gram.float()
        diagonal = gram.diagonal().clone()
        self.dead = diagonal <= 0
        diagonal[self.dead] = 1.0
        self._energy = diagonal.masked_fill(self.dead, 0.0)
        damped = diagonal * (1 + damping[0]) + damping[1] * diagonal.mean()
        if not bool(torch.isfinite(damped).all()):
            raise ValueError("the layer's inputs are so large that the sum of their squares overflows FP32")
        self.scale = damped.sqrt()
        self.matrix = gram / self.scale[:, None] / self.scale[None, :]
        self.matrix.fill_diagonal_(1.0)
        self._inverses: dict[tuple[float, bool], torch.Tensor] = {}  # by (rho, rounded)

    def squared_error(self, error: torch.Tensor) -> float:
        """tr(E H E^T) with H as it was before damping, for an error E (out, in) that is not scaled."""
        scaled = error * self.scale
        damping = (1 - self._energy / self.scale.square()) * scaled.square().sum(0, dtype=torch.float64)
        return max(squared_error(scaled, self.matrix) - float(damping.sum()), 0.0)

    @cached_property
    def _eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.clamp_(min=0.0), vectors  # G is positive semidefinite: below zero is rounding

    @cached_property
    def root(self) -> torch.Tensor:
        """R (n, n) with R R^T = G, also for a singular G: the Frobenius norm of E R is the norm of E under G."""
        values, vectors = self._eigen
        return vectors * values.sqrt()

    @cached_property
    def inverse_factor(self) -> tuple[torch.Tensor, float]:
        """Upper triangular U (n, n) with U^T U = (G + jitter I)^-1, and the jitter.

        U is the inverse of the upper triangular R with R R^T = G, a Cholesky factorisation from the last column to
        the first. It avoids the inverse of G, whose rounding errors would enter twice. The jitter is 0, or for a
        singular G the smallest power of ten that leaves every pivot above rounding.
        """
        G = self.matrix
        identity = torch.eye(len(G), dtype=G.dtype, device=G.device)
        for jitter in itertools.chain([0.0], (10.0**power for power in itertools.count(-7))):
            R, failed = torch.linalg.cholesky_ex((G + jitter * identity).flip(0, 1))
            if not failed and float(R.diagonal().square().min()) > torch.finfo(G.dtype).eps:
                return torch.linalg.solve_triangular(R.flip(0, 1), identity, upper=True), jitter

    def inverse(self, rho: float, precision: str = "fp32") -> torch.Tensor:
        """(G + rho I)^-1, (n, n), by Cholesky, or by eigenvalues if FP32 rounding makes Cholesky fail.

        The first inverses are kept for later calls, up to `KEPT_INVERSES` entries. The result is the caller's own.

        Args:
            precision: in which the result is used. On CUDA its products are rounded alike, to TF32 at the most.
        """
        rounded = self.matrix.is_cuda and precision != "fp32"
        key = rho, rounded
        if key in self._inverses:
            return self._inverses[key].clone()
        inverse = self._inverse(rho, rounded)
        if (len(self._inverses) + 1) * inverse.numel() <= KEPT_INVERSES:
            self._inverses[key] = inverse.clone()
        return inverse

    def _inverse(self, rho: float, rounded: bool) -> torch.Tensor:
        shifted = self.matrix.clone()
        shifted.diagonal().add_(rho)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        del shifted
        if not failed and rounded:  # torch's function takes six times the operations, and none in TF32
            with matmuls("high"):
                return _square_of_lower(lower_inverse(factor))
        if not failed:
            return torch.cholesky_inverse(factor)
        values, vectors = self._eigen
        return (vectors / (values + rho)) @ vectors.T


def lower_inverse(L: torch.Tensor) -> torch.Tensor:
    """L^-1 (n, n) of a lower triangular L by halves, so that nearly all of it is products of matrices."""
    size = len(L)
    if size <= SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, identity, upper=False)
    first, second = slice(0, size // 2), slice(size // 2, size)
    result = torch.zeros_like(L)
    result[first, first] = lower_inverse(L[first, first])
    result[second, second] = lower_inverse(L[second, second])
    torch.mm(result[second, second] @ L[second, first], result[first, first], out=result[second, first])
    result[second, first].neg_()
    return result


def _square_of_lower(U: torch.Tensor) -> torch.Tensor:
    """U^T U (n, n) of a lower triangular U."""
    result = torch.empty_like(U)
    for own, until in _lower_parts(len(U)):
        result[own, until] = U[own.start :, own].T @ U[own.start :, until]
    return _mirror(result)


def shift_inverse(M: torch.Tensor, rho: float, delta: float, precision: str = "fp32") -> torch.Tensor:
    """(G + (rho + delta) I)^-1 from M = (G + rho I)^-1, G positive semidefinite, by one or two products.

    Let e = delta / rho. Up to `SMALL_SHIFT` the result is M times the line in delta M that is nearest to 1 / (1 + x) on
    [0, e]; the relative error of every eigenvalue is at most e^2 / 8. For larger shifts it is four terms of the Neumann
    series; the error is at most e^4. The precision (see `precision.product`) rounds delta M only.
    """
    square, e = _symmetric_product(M, M, precision), delta / rho
    if e <= SMALL_SHIFT:
        slope = 1 / (1 + e)
        return square.mul_(-slope * delta).add_(M, alpha=(1 + 2 * math.sqrt(slope) - slope) / 2)
    if precision == "bf16" and M.is_cuda:
        rounded = square.bfloat16()
        two_terms = square.mul_(-delta).add_(M)  # in the place of the square
    else:
        rounded, two_terms = square, torch.add(M, square, alpha=-delta)
    return _symmetric_product(rounded, two_terms, precision).mul_(delta**2).add_(two_terms)


def _symmetric_product(left: torch.Tensor, right: torch.Tensor, precision: str) -> torch.Tensor:
    """left @ right of commuting symmetric matrices. Of a large product on CUDA only the lower part is computed."""
    if not left.is_cuda or len(left) < SPLIT:
        return product(left, right, precision)
    result = torch.empty_like(right, dtype=torch.float32)
    if precision == "bf16":
        same, right = left is right, right.bfloat16()
        left = right if same else left.bfloat16()
    for own, until in _lower_parts(len(left)):
        result[own, until] = product(left[own], right[:, until], precision)
    return _mirror(result)


def _lower_parts(size: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of the parts in which the lower half of a symmetric matrix is computed; all of it if small."""
    step = -(-size // PARTS) if size >= SPLIT else size
    return [
        (slice(first, min(first + step, size)), slice(0, min(first + step, size))) for first in range(0, size, step)
    ]


def _mirror(matrix: torch.Tensor) -> torch.Tensor:
    """Copies what the parts of the lower half have below the diagonal to the place above it, in place."""
    for own, _ in _lower_parts(len(matrix)):
        matrix[: own.start, own] = matrix[own, : own.start].T
    return matrix


def squared_error(error: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(E H E^T) for an error E (out, in) and a Gram matrix H (in, in)."""
    return float(((error @ gram) * error).sum(dtype=torch.float64))
