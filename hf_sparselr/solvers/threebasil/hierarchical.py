"""3BASiL with a hierarchical low-rank part: ADMM and refit with sweeps in the place of subspace steps.

Leaves are dense, so nonzeros of S inside them would add nothing: an unstructured S has none there. An N:M support keeps
its pattern everywhere.
"""

import torch

from ...format.decomposition import Decomposition
from ...format.hierarchy import HierarchyShape
from ...format.patterns import NM, Pattern, project
from ...utils.phase_timer import PhaseTimer
from ...utils.precision import matmuls, subtract_product
from ..base import scaled, unscale
from ..gram import ScaledGram, squared_error
from ..hierarchical_fit import HierarchicalFit, leaf_mask
from ..permutation import orders_of
from .admm import Admm
from .method import SETTLED, Options, iterate, refine_on_support


class HierarchicalAdmm(Admm):
    """`Admm` of one layer, whose L is fitted to E by a sweep of `fit`.

    Args:
        leaves: bool (out, in), where S must be zero; None for nowhere.
        fit: of the layer's error.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        gram: ScaledGram,
        pattern: Pattern,
        leaves: torch.Tensor | None,
        fit: HierarchicalFit,
        options: Options,
        seed: int,
    ) -> None:
        self._leaves, self._sweeps = leaves, fit
        super().__init__([weight], gram, [pattern], [0], options.rho, seed, options.precision)

    def restart(self, rho: float) -> None:
        super().restart(rho)
        self._sweeps.reset()

    def _step(self, steps: int) -> None:
        for _ in range(steps):
            E = subtract_product(self.L, self._correct(), self._factor, self.precision)
            with matmuls("highest"):  # the sweep multiplies by inverses, which rounded factors would spoil
                L = self._sweeps.sweep(E)
            self._project(E)
            self.L.copy_(L)  # E was in its place

    def _project(self, E: torch.Tensor) -> None:
        if self._leaves is None:
            super()._project(E)
            return
        self._mover(None)(self.T, self.mask, self.W, E, None)
        self.layers[0].project(self.T.abs().masked_fill_(self._leaves, 0.0), self.mask)

    def support(self) -> tuple[torch.Tensor, torch.Tensor]:
        """D, exactly in its pattern, and the bool mask."""
        T = self.T if self._leaves is None else self.T.masked_fill(self._leaves, 0.0)
        return project(T, self.layers[0].pattern)


def solve_hierarchical(
    weight: torch.Tensor,
    gram: ScaledGram,
    pattern: Pattern,
    shape: HierarchyShape,
    permutation: str | None,
    options: Options,
    seed: int = 0,
) -> Decomposition:
    """Decomposes one layer; see `registry.Method.solve_hierarchical`. The permutation is that of the scaled weight.

    Returns:
        `stats` as those of `solve`.
    """
    Wt = scaled(weight, gram)
    phases = PhaseTimer(Wt.device, memory=False)
    with phases("factorisation"):
        orders = orders_of(Wt, permutation)
        fit = HierarchicalFit(shape, gram.matrix, orders, seed)
        leaves = None if isinstance(pattern, NM) else leaf_mask(shape, orders, Wt.device)
        admm = HierarchicalAdmm(Wt, gram, pattern, leaves, fit, options, seed)
    stats = iterate(admm, options, phases)
    with phases("refit"), matmuls("highest"):
        S, mask, objective = _refit(Wt, *admm.support(), fit, gram.matrix, options)
        result = unscale(S, mask, None, Wt - S, gram)
        result.hierarchy = fit.hierarchy(gram)
    result.stats = {**stats, "objective": objective, "phases": phases.seconds}
    return result


def _refit(
    Wt: torch.Tensor,
    S: torch.Tensor,
    mask: torch.Tensor,
    fit: HierarchicalFit,
    G: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Alternates sweeps given S and CG on S given its support; `fit` ends with the sweep for the S returned."""
    objective = squared_error(Wt - S - fit.sweep(Wt - S), G)
    for _ in range(options.refit_rounds):
        S, last = refine_on_support(S, Wt - fit.matrix(), mask, G, options.cg_steps), objective
        objective = squared_error(Wt - S - fit.sweep(Wt - S), G)
        if last - objective < SETTLED * objective:
            break
    return S, mask, objective
