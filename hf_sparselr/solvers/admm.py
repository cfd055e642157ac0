"""The iteration of 3BASiL (arXiv 2603.01376, section 3) for layers that share a Gram matrix, one product a step.

With R = Wt - L and M = (G + rho I)^-1 the dense copy's update (G + rho I)^-1 (G (Wt - L) - V + rho D) is
R + (rho (D - R) - V) M, because M G = I - rho M: one large product, and a correction that is small next to R, so
that TF32 is accurate enough for it.

D lives on the support and the dual V = rho (T - D) off it, so one matrix T = copy + V / rho holds both. Rows of all
layers of a group are stacked: they share the product and the penalty, and only the low-rank step and unstructured
supports look at single layers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from ..gram import ScaledGram, shift_inverse, squared_error
from ..patterns import NM, Pattern, project
from ..precision import matmuls
from .base import orthonormalise, start_basis

LARGE = 2**22  # weights: above, a step is bound by memory and is fused; below, by launches and is graphed
CHUNK = 2**16  # weights that stay in a core's cache between the elementwise passes of a step on the CPU
LARGEST_SHIFT = 1.15  # a larger factor for rho takes a new factorisation
TF32_ERROR = 2e-3  # share of the objective that rounding the product to TF32 may add


@dataclass
class _Layer:
    rows: slice
    pattern: Pattern
    rank: int
    basis: torch.Tensor | None = field(default=None)


class Admm:
    """State and steps of the iteration.

    Args:
        weights: Wt (out_i, in) of every layer, FP32, scaled.
        gram: of their common input, on the same device.
        patterns, ranks: one a layer.
        rho: first penalty.
        seed: of the first low-rank bases.
        precision: of the large product on CUDA: "tf32", "fp32" or "auto" (TF32 for large layers, unless its rounding
            would show).
    """

    def __init__(
        self,
        weights: list[torch.Tensor],
        gram: ScaledGram,
        patterns: list[Pattern],
        ranks: list[int],
        rho: float,
        seed: int,
        precision: str,
    ) -> None:
        self.W = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.gram = gram
        # Bound by launches, small products gain nothing from TF32.
        plain = not self.W.is_cuda or (precision == "auto" and self.W.numel() <= LARGE)
        self.precision = "fp32" if plain else precision
        self.layers: list[_Layer] = []
        first = 0
        for weight, pattern, rank in zip(weights, patterns, ranks, strict=True):
            self.layers.append(_Layer(slice(first, first + len(weight)), pattern, rank))
            first += len(weight)
        self.kept = sum(pattern.kept(weight.shape) for weight, pattern in zip(weights, patterns, strict=True))
        self.mask = torch.empty_like(self.W, dtype=torch.bool)
        self.T, self.R = torch.empty_like(self.W), torch.empty_like(self.W)
        self.M = torch.empty_like(gram.matrix)
        self._rho = torch.empty((), device=self.W.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._runs = 0
        self.restart(rho)
        for layer in self.layers:
            if layer.rank:
                error = self.W[layer.rows] - self.T[layer.rows]
                layer.basis = start_basis(error, gram.matrix, layer.rank, seed)

    def restart(self, rho: float) -> None:
        """D = project(Wt), V = 0, L = 0."""
        self._set_rho(rho)
        self.M.copy_(self.gram.inverse(rho))
        for layer in self.layers:
            D, mask = project(self.W[layer.rows], layer.pattern)
            self.T[layer.rows], self.mask[layer.rows] = D, mask
        self.R.copy_(self.W)

    def raise_rho(self, factor: float) -> None:
        """Multiplies the penalty by a factor >= 1; V stays what it is."""
        rho = self.rho * factor
        if factor <= LARGEST_SHIFT:
            with self._products():
                self.M.copy_(shift_inverse(self.M, rho - self.rho))
        else:
            self.M.copy_(self.gram.inverse(rho))
        self._set_rho(rho)
        self.T.copy_(torch.where(self.mask, self.T, self.T / factor))

    def _set_rho(self, rho: float) -> None:
        self.rho = rho
        self._rho.fill_(rho)  # steps read it on the device

    def run(self, steps: int) -> None:
        """Steps without a host synchronisation; small problems on CUDA replay them as a graph."""
        self._runs += 1
        if not self.W.is_cuda or self.W.numel() > LARGE or self._runs == 1:
            for _ in range(steps):
                self._step()
            if self._runs == 1 and self.precision == "auto":
                self.precision = "fp32" if self._prefers_fp32() else "tf32"
            return
        if steps not in self._graphs:
            self._graphs[steps] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.W.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for _ in range(steps):
                    self._step()
        self._graphs[steps].replay()

    def result(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """(D, mask, basis) of every layer, D exactly in its pattern."""
        for layer in self.layers:
            yield *project(self.T[layer.rows], layer.pattern), layer.basis

    def _step(self) -> None:
        Z = (_compiled(_correction) if self._fused else _correction)(self.T, self.mask, self.R, self._rho)
        with self._products():
            copy = torch.addmm(self.R, Z, self.M)
        self._sparse(copy)
        for layer in self.layers:
            if layer.rank:
                E, W = copy[layer.rows], self.W[layer.rows]
                Y = E @ (self.gram.matrix @ (E.T @ layer.basis))
                layer.basis.copy_(orthonormalise(Y))
                torch.addmm(W, layer.basis, layer.basis.T @ E, alpha=-1, out=self.R[layer.rows])

    def _sparse(self, copy: torch.Tensor) -> None:
        """T = copy + V / rho and its support; turns `copy` into E = Wt - copy."""
        patterns = {layer.pattern for layer in self.layers}
        if len(patterns) == 1 and isinstance(pattern := patterns.pop(), NM):
            step = _compiled(_sparse_rows) if self._fused else _sparse_rows
            for rows in self._chunks():
                step(self.T[rows], self.mask[rows], copy[rows], self.W[rows], pattern)
            return
        for rows in self._chunks():
            _sparse_rows(self.T[rows], self.mask[rows], copy[rows], self.W[rows], None)
        for layer in self.layers:
            self.mask[layer.rows] = layer.pattern.near_mask(self.T[layer.rows].abs())

    @property
    def _fused(self) -> bool:
        return self.W.is_cuda and self.W.numel() > LARGE

    def _chunks(self) -> list[slice]:
        rows = len(self.W) if self.W.is_cuda else max(CHUNK // self.W.shape[1], 1)
        return [slice(first, first + rows) for first in range(0, len(self.W), rows)]

    def _products(self) -> AbstractContextManager:
        return matmuls("highest" if self.precision == "fp32" else "high")

    def _prefers_fp32(self) -> bool:
        """Whether TF32 rounding of the product would show in the objective: ill-conditioned Gram matrices."""
        rows = slice(0, min(len(self.W), 256))
        Z = _correction(self.T[rows], self.mask[rows], self.R[rows], self._rho)
        exact = Z @ self.M
        with matmuls("high"):
            rounding = Z @ self.M - exact
        error = self.R[rows] - torch.where(self.mask[rows], self.T[rows], 0)
        allowed = TF32_ERROR * squared_error(error, self.gram.matrix)
        return squared_error(rounding, self.gram.matrix) > allowed


def _correction(T: torch.Tensor, mask: torch.Tensor, R: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
    """rho (D - R) - V."""
    return torch.where(mask, T, -T).sub_(R).mul_(rho)


def _sparse_rows(
    T: torch.Tensor, mask: torch.Tensor, copy: torch.Tensor, W: torch.Tensor, pattern: NM | None
) -> None:
    T.masked_fill_(mask, 0.0).add_(copy)
    copy.neg_().add_(W)
    if pattern is not None:
        mask.copy_(pattern.mask(T.abs()))


_COMPILED: dict = {}


def _compiled(function: Callable) -> Callable:
    """A step as one kernel; without Triton or a C compiler PyTorch says so and runs it as it is."""
    if function not in _COMPILED:
        fused = torch.compile(function, dynamic=True)
        _COMPILED[function] = torch._dynamo.config.patch(suppress_errors=True)(fused)
    return _COMPILED[function]
