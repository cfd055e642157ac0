"""The iteration of 3BASiL (arXiv 2603.01376, section 3) for layers that share a Gram matrix: one large product a step.

Let M = (G + rho I)^-1 and Z = rho (D + L - Wt) - V. The published update of the dense copy,
(G + rho I)^-1 (G (Wt - L) - V + rho D), equals Wt - L + Z M, because M G = I - rho M. It takes one large product. Z M
is small next to Wt, so its factors may be rounded to BF16. The remainder of Wt is E = Wt - copy = L - Z M.

D is zero off the support and the dual V = rho (T - D) is zero on it, so one matrix T = copy + V / rho holds both. The
rows of all layers of a group are stacked: the layers share the product and the penalty. Only the low-rank step and
unstructured supports look at single layers.

Several processes share the rows of every layer. Only sums over rows are exchanged: a thin matrix and a small one a step
for the low-rank part, and counts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ...format.patterns import NM, Pattern
from ...utils.availability import TRITON
from ...utils.cuda_graphs import capturing
from ...utils.precision import LARGE, LEVELS, coarsest, finer, matmuls, product, subtract_product
from ...utils.world import ALONE, World
from ..base import randomized_range_finder
from ..gram import ScaledGram, shift_inverse, squared_error
from ..spread_rows import exact_mask, near_threshold
from . import cpu_steps
from .bands import bands_of, set_bases

LARGEST_SHIFT = 1.15  # a larger factor for rho needs a new factorisation
ROUNDING = 5e-6  # share of the objective that rounding the product's factors may add


@dataclass
class _Layer:
    out: int  # rows of the layer in all processes
    rows: slice  # those of this one in the stack
    pattern: Pattern
    rank: int
    world: World
    basis: torch.Tensor | None = None  # a part of its band's; None at rank 0
    threshold: float | None = None  # of the previous support: where the search on the CPU starts

    def project(self, scores: torch.Tensor, mask: torch.Tensor) -> None:
        """Writes the support of the scores (rows, in) into the mask; unstructured ones need not be exact."""
        if isinstance(self.pattern, NM):
            mask.copy_(self.pattern.mask(scores))
            return
        threshold = near_threshold(scores, self.pattern, self.out, self.threshold, self.world)
        if not scores.is_cuda:
            self.threshold = float(threshold)
        torch.gt(scores, threshold, out=mask)

    def nearest(self, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest rows that obey the pattern exactly, and their bool support."""
        mask = exact_mask(dense.abs(), self.pattern, self.out, self.world)
        return dense * mask, mask


class Admm:
    """State and steps of the iteration.

    Args:
        weights: Wt (out_i, in) of every layer, FP32, scaled.
        gram: of their common input, on the same device.
        patterns, ranks: one per layer.
        rho: first penalty.
        seed: draws the first low-rank bases.
        precision: of the large product: "bf16", "tf32" or "fp32", or a finer one if the device lacks it. "auto" takes
            the coarsest one whose rounding does not show.
        world: the processes that share the rows of every layer. State and results are of this one's rows.
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
        world: World = ALONE,
    ) -> None:
        self.world = world
        own = [weight[world.rows(len(weight))] for weight in weights]
        self.W = own[0].contiguous() if len(own) == 1 else torch.cat(own)
        self.gram = gram
        self._in_c = not self.W.is_cuda and cpu_steps.available()
        self._auto = precision == "auto"
        self.layers: list[_Layer] = []
        first = 0
        for weight, part, pattern, rank in zip(weights, own, patterns, ranks, strict=True):
            self.layers.append(_Layer(len(weight), slice(first, first + len(part)), pattern, rank, world))
            first += len(part)
        self.kept = sum(pattern.kept(weight.shape) for weight, pattern in zip(weights, patterns, strict=True))
        small = self.W.is_cuda and self.W.numel() <= LARGE  # launches limit the speed
        self._bands = bands_of([(layer.rows, layer.rank) for layer in self.layers], self.W, join=small)
        for band in self._bands:
            for index, basis in band.bases.items():
                self.layers[index].basis = basis
        self.mask = torch.empty_like(self.W, dtype=torch.bool)
        self.T, self.L = torch.empty_like(self.W), torch.empty_like(self.W)
        self._other: torch.Tensor | None = None  # in the place of L in every second joined step
        self.M = torch.empty_like(gram.matrix)
        self._rho = torch.empty((), device=self.W.device)
        self._coarsest = _first_precision(precision, self.W)
        self._set_precision(self._coarsest)
        self._seed = seed
        self._begin(rho)

    def retarget(self, weights: list[torch.Tensor], rho: float) -> None:
        """Starts again, like a new object, on weights of the same shapes; overwrites the current weights."""
        torch.cat(weights, out=self.W)  # in place: captured graphs read this memory
        self._begin(rho)

    def _begin(self, rho: float) -> None:
        if self.precision != self._coarsest:
            self._set_precision(self._coarsest)
        self._next_check = 0 if self._auto else math.inf
        self._start(rho)

    def _start(self, rho: float) -> None:
        self._steps = 0
        self.restart(rho)
        for layer in self.layers:
            if layer.basis is not None:
                error = self.W[layer.rows] - self.T[layer.rows]
                start = randomized_range_finder(error, self.gram.matrix, layer.rank, self._seed, world=self.world)
                layer.basis.copy_(start)
        for band in self._bands:
            torch.mm(band.basis.T, self.W[band.rows] - self.T[band.rows], out=band.coefficients)
            self.world.sum_(band.coefficients)

    def restart(self, rho: float) -> None:
        """D = project(Wt), V = 0, L = 0."""
        self._set_rho(rho)
        self._set_inverse(self.gram.inverse(rho, self.precision))
        for layer in self.layers:
            self.T[layer.rows], self.mask[layer.rows] = layer.nearest(self.W[layer.rows])
        self.L.zero_()

    def raise_rho(self, factor: float) -> None:
        """Multiplies the penalty by a factor >= 1; V does not change."""
        delta = self.rho * (factor - 1)
        self._set_inverse(
            shift_inverse(self.M, self.rho, delta, self.precision)
            if factor <= LARGEST_SHIFT
            else self.gram.inverse(self.rho + delta, self.precision)
        )
        self._set_rho(self.rho + delta)
        if self._in_triton():
            from . import gpu_steps

            gpu_steps.stiffen(self.T, self.mask, factor)
        else:
            self.T.copy_(torch.where(self.mask, self.T, self.T / factor))

    def _set_inverse(self, M: torch.Tensor) -> None:
        if self._rounded_M is None:
            self.M.copy_(M)  # captured graphs read this memory
        else:
            self.M = M
            self._rounded_M.copy_(M)

    def _set_precision(self, precision: str) -> None:
        self.precision = precision
        self._rounded_M = self.M.bfloat16() if precision == "bf16" and self.M.is_cuda else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by steps
        self._warm = False  # whether the kernels of a step have been compiled
        self._Z: torch.Tensor | None = None  # made in the first steps on a GPU, so that no graph has it in its memory

    def _set_rho(self, rho: float) -> None:
        self.rho = rho
        self._rho.fill_(rho)  # steps read it on the device

    def run(self, steps: int) -> None:
        """Runs steps without a host synchronisation; on CUDA as a graph, once their kernels are compiled."""
        first = self._steps == 0
        self._advance(steps)
        if self._steps >= self._next_check:
            self._next_check = 2 * self._steps
            if self._refine_precision():
                if first:
                    self._start(self.rho)  # as if the precision had never been coarser
                    self._advance(steps)
                else:
                    self._set_inverse(
                        self.gram.inverse(self.rho, self.precision)
                    )  # the shifts that made M were rounded, too

    def _advance(self, steps: int) -> None:
        if self._are_joined():
            self._Z = self._correct()  # after the first one, each step makes the correction of the next
        if self.W.is_cuda and self._warm:
            self._replay(steps)
        else:
            self._step(steps)
            self._warm = True
        self._steps += steps

    def _replay(self, steps: int) -> None:
        unit = 2 if steps % 2 == 0 else 1  # a graph of more steps takes longer to make than it saves
        if unit not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self.W.device):
                self._step(unit)
            self._graphs[unit] = graph
        with torch.cuda.device(self.W.device):
            for _ in range(steps // unit):
                self._graphs[unit].replay()

    def changed(self, before: torch.Tensor) -> float:
        """The share of the kept entries that an earlier mask did not keep."""
        return self.world.total((self.mask != before).sum(), self.mask.device) / max(self.kept, 1)

    def result(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yields (D, mask, basis) of every layer; D is exactly in its pattern."""
        for layer in self.layers:
            yield *layer.nearest(self.T[layer.rows]), layer.basis

    def _step(self, steps: int) -> None:
        if self._are_joined():
            self._joined_steps(steps)
            return
        for _ in range(steps):
            E = subtract_product(self.L, self._correct(), self._factor, self.precision)
            coefficients = self._coefficients(E)
            self._project(E)
            self._fit(coefficients, self.L)

    def _are_joined(self) -> bool:
        """Whether the kernel that moves T makes the next step's correction, too."""
        pattern = self._common_pattern()
        return pattern is not None and self._in_triton(pattern)

    def _joined_steps(self, steps: int) -> None:
        """The same steps, on Z as the step before left it."""
        from . import gpu_steps

        if self._other is None:
            self._other = torch.empty_like(self.L)
        Z, L, other, pattern = self._Z, self.L, self._other, self._common_pattern()
        for _ in range(steps):
            E = subtract_product(L, Z, self._factor, self.precision)
            self._fit(self._coefficients(E), other)
            gpu_steps.move_and_correct(self.T, self.mask, self.W, E, other, self._rho, Z, pattern)
            L, other = other, L
        if L is not self.L:
            self.L.copy_(L)

    def _fit(self, coefficients: list[torch.Tensor], L: torch.Tensor) -> None:
        """Writes P P^T E into L, from P^T E of all bands."""
        if sum(band.rows.stop - band.rows.start for band in self._bands) < len(L):
            L.zero_()
        with self._products():
            for band, part in zip(self._bands, coefficients, strict=True):
                torch.mm(band.basis, part, out=L[band.rows])

    @property
    def _factor(self) -> torch.Tensor:
        return self.M if self._rounded_M is None else self._rounded_M

    def _correct(self) -> torch.Tensor:
        if self._in_c:
            return cpu_steps.correction(self.T, self.mask, self.W, self.L, self.rho)
        if self._in_triton():
            from . import gpu_steps

            if self._Z is None:
                self._Z = torch.empty_like(self.W, dtype=self._factor.dtype)
            gpu_steps.correction(self.T, self.mask, self.W, self.L, self._rho, self._Z)
            return self._Z
        return self._fused(_correction)(self.T, self.mask, self.W, self.L, self._rho, self._factor.dtype)

    def _project(self, E: torch.Tensor) -> None:
        """Updates T and its support from the remainder E = Wt - copy."""
        pattern = self._common_pattern()
        self._mover(pattern)(self.T, self.mask, self.W, E, pattern)
        for layer in self.layers if pattern is None else ():
            layer.project(self.T[layer.rows].abs(), self.mask[layer.rows])

    def _common_pattern(self) -> NM | None:
        """The N:M pattern that all layers have."""
        patterns = {layer.pattern for layer in self.layers}
        shared = patterns.pop() if len(patterns) == 1 else None
        return shared if isinstance(shared, NM) else None

    def _in_triton(self, pattern: NM | None = None) -> bool:
        """Whether the elementwise steps under a pattern run in Triton."""
        if not (self.W.is_cuda and TRITON):
            return False
        from . import gpu_steps

        return gpu_steps.supports(pattern)

    def _mover(self, pattern: NM | None) -> Callable:
        """The fastest implementation of `_sparse` for a pattern."""
        if self._in_c:
            return cpu_steps.move
        if self._in_triton(pattern):
            from . import gpu_steps

            return gpu_steps.move
        return self._fused(_sparse)

    def _coefficients(self, E: torch.Tensor) -> list[torch.Tensor]:
        """P^T E of all bands, after one subspace step on E G E^T; then L = P P^T E.

        The step takes P^T E of the step before in the place of its own: E hardly changes, and is read once less.
        """
        if not self._bands:
            return []
        parts = [E[band.rows] for band in self._bands]
        with self._products():
            seen = self.gram.matrix @ torch.cat([band.coefficients for band in self._bands]).T
            columns = seen.split([band.basis.shape[1] for band in self._bands], 1)
            spans = [part @ own for part, own in zip(parts, columns, strict=True)]
        set_bases(self._bands, spans, self.world)
        with self._products():
            for part, band in zip(parts, self._bands, strict=True):
                torch.mm(band.basis.T, part, out=band.coefficients)
                self.world.sum_(band.coefficients)
        return [band.coefficients for band in self._bands]

    def _fused(self, function: Callable) -> Callable:
        return _compiled(function) if self.W.is_cuda else function

    def _products(self) -> AbstractContextManager:
        return matmuls(LEVELS[self.precision])

    def _refine_precision(self) -> bool:
        """Takes a finer precision while rounding shows, as it does with ill-conditioned Gram matrices.

        Returns:
            whether the precision changed.
        """
        before = self.precision
        while self.precision != "fp32" and self._rounding() > ROUNDING:
            self._set_precision(finer(self.precision, self.W.device))
        return self.precision != before

    def _rounding(self) -> float:
        """The share of the objective that rounding the factors of the product adds, measured on some rows."""
        rows = slice(0, min(len(self.W), 256))
        T, mask, W, L = self.T[rows], self.mask[rows], self.W[rows], self.L[rows]
        Z = _correction(T, mask, W, L, self._rho, torch.float32)
        rounding = product(Z, self.M, self.precision) - product(Z, self.M, "fp32")
        error = W - L - torch.where(mask, T, 0)
        added, objective = (
            self.world.total(squared_error(error, self.gram.matrix), W.device) for error in (rounding, error)
        )
        return added / max(objective, torch.finfo(torch.float32).tiny)


def _first_precision(precision: str, W: torch.Tensor) -> str:
    if precision == "auto":
        return coarsest(W.device)
    return precision if W.is_cuda or precision == coarsest(W.device) else "fp32"


def _correction(
    T: torch.Tensor,
    mask: torch.Tensor,
    W: torch.Tensor,
    L: torch.Tensor,
    rho: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Z = rho (D + L - W) - V, rounded to a dtype; all (out, in)."""
    return torch.where(mask, T, -T).sub_(W).add_(L).mul_(rho).to(dtype)


def _sparse(T: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, E: torch.Tensor, pattern: NM | None) -> None:
    """Sets T = W - E + V / rho and, under N:M, the mask to its support; all (out, in)."""
    T.masked_fill_(mask, 0.0).add_(W).sub_(E)
    if pattern is not None:
        mask.copy_(pattern.mask(T.abs()))


_COMPILED: dict = {}


def _compiled(function: Callable) -> Callable:
    """The function as one kernel. Without Triton or a C compiler PyTorch warns and runs it uncompiled."""
    if function not in _COMPILED:
        fused = torch.compile(function, dynamic=True)
        _COMPILED[function] = torch._dynamo.config.patch(suppress_errors=True)(fused)
    return _COMPILED[function]
