"""Non-uniform allocation: each layer's sparsity and rank, with as many parameters as uniform settings keep.

`allocate` takes the uniform plan and the dense model's weights and Gram matrices, one block at a time. It returns the
plan with other settings. Settings from `overrides` stay. Only scores and curves outlive a block.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..config.options import GlobalOptions, OwlOptions, Shape
from ..format.patterns import Pattern, Unstructured
from ..solvers import svd, threebasil
from ..solvers.gram import ScaledGram

if TYPE_CHECKING:
    from ..config.sparselr_config import SparseLRConfig
    from .plan import Layer

Plan = dict[str, "Layer"]


@dataclass
class DenseGroup:
    """Layers of one dense block that share their input.

    Attributes:
        block: the block's dotted name.
        weights: {layer name: W (out, in), FP32}.
        gram: H (in, in), FP32.
        scaled: H damped and scaled, for solvers.
        output_loss: (layer name, weight (out, in)) -> |f'(x) - f(x)|^2 / |f(x)|^2 on some of the calibration windows,
            where f(x) is the block's output and f'(x) its output with that weight in the place of W.
    """

    block: str
    weights: dict[str, torch.Tensor]
    gram: torch.Tensor
    scaled: ScaledGram
    output_loss: Callable[[str, torch.Tensor], float]


def allocate(config: "SparseLRConfig", plan: Plan, groups: Iterable[DenseGroup]) -> tuple[Plan, dict]:
    """The plan with the settings that `config.allocation` chooses, and a summary for the report.

    Args:
        plan: uniform settings.
        groups: of the dense model; not read for "uniform".
    """
    return ALLOCATIONS[config.allocation](config, plan, groups)


def _uniform(config: "SparseLRConfig", plan: Plan, groups: Iterable[DenseGroup]) -> tuple[Plan, dict]:
    return plan, {}


# -- OWL


def _owl(config: "SparseLRConfig", plan: Plan, groups: Iterable[DenseGroup]) -> tuple[Plan, dict]:
    """OWL (arXiv 2310.05175): a block whose Wanda scores have more outliers stays denser."""
    options: OwlOptions = config.allocation_options
    blocks, outliers, sizes = {}, Counter(), Counter()
    for group in groups:
        for name, weight in group.weights.items():
            if "sparsity" not in config.override_of(name):
                blocks[name] = group.block
                outliers[group.block] += outlier_count(weight, group.gram, options.outlier_threshold)
                sizes[group.block] += weight.numel()
    if not blocks:
        return plan, {}
    ratios = {block: outliers[block] / sizes[block] for block in sizes}
    uniform = plan[next(iter(blocks))].pattern.sparsity
    sparsities = owl_sparsities(ratios, sizes, uniform, options.spread)
    moved = {name: replace(plan[name], pattern=Unstructured(sparsities[block])) for name, block in blocks.items()}
    return {**plan, **moved}, {"outlier_ratio": ratios, "sparsity": sparsities}


def outlier_count(weight: torch.Tensor, gram: torch.Tensor, threshold: float) -> int:
    """How many Wanda scores |W| sqrt(diag H) of a layer (out, in) exceed `threshold` times their mean."""
    scores = weight.abs() * gram.diagonal().sqrt()
    return int((scores > threshold * scores.mean()).sum())


def owl_sparsities(
    ratios: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    """Block sparsities that fall linearly with the outlier ratios and keep the mean.

    The paper wants the range [s - lambda, s + lambda] and the mean s, but a linear map of the ratios' range onto that
    range meets the mean only by chance. Here the mean, weighted by the blocks' sizes, is s, and the block farthest from
    the mean ratio gets s - lambda or s + lambda.

    Args:
        ratios: {block: share of outliers}.
        sizes: {block: weights}.
    """
    mean = sum(ratios[block] * sizes[block] for block in ratios) / sum(sizes.values())
    farthest = max(abs(ratio - mean) for ratio in ratios.values())
    slope = spread / farthest if farthest > 1e-9 else 0.0  # else all are equal, up to rounding
    return {block: sparsity - slope * (ratio - mean) for block, ratio in ratios.items()}


# -- global


@dataclass(frozen=True)
class Point:
    """Settings that a layer may get, and its error with them.

    Attributes:
        shape: of the layer, (out, in).
        kept: nonzeros of S.
        rank: of B A.
        error: of the layer; `spend` sums it over layers.
    """

    shape: Shape
    kept: int
    rank: int
    error: float

    @property
    def parameters(self) -> int:
        return self.kept + self.rank * sum(self.shape)


def _global(config: "SparseLRConfig", plan: Plan, groups: Iterable[DenseGroup]) -> tuple[Plan, dict]:
    """One parameter budget for the model, spent where the measured errors fall fastest.

    A layer's error is the loss of its block's output (`DenseGroup.output_loss`): of the measures that were tried, it
    predicts best how much the layer changes the model's predictions (see NOTES.md).
    """
    curves, uniform = {}, {}
    for group in groups:
        for name, weight in group.weights.items():
            layer = plan[name]
            grid = candidates(layer, config.override_of(name), tuple(weight.shape), config.allocation_options)
            points = [_trial(config, layer, *settings, weight, group) for settings in grid]
            curves[name] = lower_hull(refined(points))
            own = (layer.pattern.kept(weight.shape), layer.rank)
            uniform[name] = next(point for point in points if (point.kept, point.rank) == own)
    chosen = spend(curves, sum(point.parameters for point in uniform.values()))
    moved = {
        name: replace(plan[name], pattern=_pattern(plan[name].pattern, point), rank=point.rank)
        for name, point in chosen.items()
    }
    totals = {"uniform": uniform.values(), "allocated": chosen.values()}
    summary = {
        field: {which: sum(getattr(point, field) for point in points) for which, points in totals.items()}
        for field in ("parameters", "error")
    }
    return {**plan, **moved}, summary


def candidates(layer: "Layer", own: Mapping, shape: Shape, options: GlobalOptions) -> list[tuple[int, int]]:
    """The grid of (nonzeros, rank) to measure: floor, uniform setting and ceiling of each number that may move.

    Args:
        own: the layer's override, whose fields do not move.
    """
    kept, rank, size = layer.pattern.kept(shape), layer.rank, math.prod(shape)
    kepts, ranks = {kept}, {rank}
    if isinstance(layer.pattern, Unstructured) and kept and "sparsity" not in own:
        step = math.floor(options.spread * size)
        kepts |= {max(kept - step, 1), min(kept + step, size)}
    if "rank" not in own:
        most = min(math.floor(options.rank_ceiling * rank), min(shape) - 1)
        least = max(math.ceil(options.rank_floor * rank), 0 if kept else 1)  # without S, B A is all there is
        ranks |= {least, max(most, rank)}
    return list(itertools.product(sorted(kepts), sorted(ranks)))


def _pattern(pattern: Pattern, point: Point) -> Pattern:
    """The pattern that keeps a point's nonzeros; the layer's own one if it does."""
    if pattern.kept(point.shape) == point.kept:
        return pattern
    return Unstructured.keeping(point.kept, math.prod(point.shape))


def _trial(
    config: "SparseLRConfig", layer: "Layer", kept: int, rank: int, weight: torch.Tensor, group: DenseGroup
) -> Point:
    """Solves a layer in a few iterations of 3BASiL, or exactly if it has no S, and measures the block's loss."""
    shape, iterations = tuple(weight.shape), config.allocation_options.iterations
    pattern = _pattern(layer.pattern, Point(shape, kept, rank, 0.0))
    if not kept:
        trial = svd.solve(weight, group.scaled, pattern, rank, svd.Options())
    else:
        options = threebasil.Options(min_iterations=iterations, max_iterations=iterations, refit_rounds=1)
        trial = threebasil.solve(weight, group.scaled, pattern, rank, options, config.seed)
    return Point(shape, kept, rank, group.output_loss(layer.name, trial.dense()))


def refined(points: list[Point], steps: int = 8) -> list[Point]:
    """The points of a grid over (nonzeros, rank), and `steps` in each cell and direction between them.

    The logarithm of the error is interpolated: over such distances it is nearly linear in both.
    """
    shape = points[0].shape
    logs = {(point.kept, point.rank): math.log(max(point.error, 1e-30)) for point in points}
    kepts, ranks = ({key[axis]: None for key in logs} for axis in (0, 1))
    fine = []
    for kept, kept_corners in _between(sorted(kepts), steps):
        for rank, rank_corners in _between(sorted(ranks), steps):
            log = sum(
                share * part * logs[corner, edge] for corner, share in kept_corners for edge, part in rank_corners
            )
            fine.append(Point(shape, kept, rank, math.exp(log)))
    return fine


def _between(values: list[int], steps: int) -> list[tuple[int, list[tuple[int, float]]]]:
    """Each value, and integers between neighbours, as [(neighbour, share), ...]."""
    inside = {value: [(value, 1.0)] for value in values}
    for low, high in itertools.pairwise(values):
        for step in range(1, steps):
            value = low + (high - low) * step // steps
            share = (value - low) / (high - low)
            inside.setdefault(value, [(low, 1 - share), (high, share)])
    return list(inside.items())


def lower_hull(points: Iterable[Point]) -> list[Point]:
    """The vertices of the lower convex hull of error over parameters, as far as more parameters mean less error."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda point: (point.parameters, point.error)):
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: Point, right: Point) -> float:
    return (right.error - left.error) / (right.parameters - left.parameters)


def spend(curves: Mapping[str, list[Point]], budget: int) -> dict[str, Point]:
    """The points on convex curves that minimise the summed error within a budget of parameters.

    All curves' steps in the order of the error that a parameter saves: as each curve's own steps get flatter, the
    greedy order is the optimal one (Fox 1966; the Lagrangian sweep of Shoham and Gersho 1988). The last step is cut to
    what is left, rounded down, with its share of the error.

    Args:
        curves: {name: vertices by rising parameters and falling error, convex}.
        budget: at least what the first vertices take.
    """
    chosen = {name: curve[0] for name, curve in curves.items()}
    left = budget - sum(point.parameters for point in chosen.values())
    steps = [(name, *pair) for name, curve in curves.items() for pair in itertools.pairwise(curve)]
    for name, start, end in sorted(steps, key=lambda step: _slope(*step[1:])):
        cost = end.parameters - start.parameters
        if cost > left:
            chosen[name] = _cut(start, end, left / cost)
            break
        chosen[name] = end
        left -= cost
    return chosen


def _cut(start: Point, end: Point, share: float) -> Point:
    kept, rank, error = (
        getattr(start, field) + share * (getattr(end, field) - getattr(start, field))
        for field in ("kept", "rank", "error")
    )
    return replace(start, kept=math.floor(kept), rank=math.floor(rank), error=error)


ALLOCATIONS: dict[str, Callable[["SparseLRConfig", Plan, Iterable[DenseGroup]], tuple[Plan, dict]]] = {
    "uniform": _uniform,
    "owl": _owl,
    "global": _global,
}
