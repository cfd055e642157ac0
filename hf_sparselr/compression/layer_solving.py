"""Solve the layers of a block: each becomes S + B A, on inputs that already passed the solved layers before it.

Several processes share the rows of large layers if the method can do that, else the layers of a group. They always
share the experts of a stack. One of them solves a group of small layers that belong together: exchanges would take
longer than they save.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..config.sparselr_config import SparseLRConfig
from ..format.decomposition import Decomposition
from ..solvers.gram import ScaledGram
from ..solvers.registry import METHODS
from ..utils.phase_timer import PhaseTimer
from ..utils.precision import matmuls
from ..utils.world import ALONE, World
from .activations import Workplace
from .capture import Call
from .layer_inputs import LayerGroup, gram_of_inputs, grams_of_experts
from .linear_layers import dense_weight, is_transposed
from .output_weights import output_weights
from .plan import Layer
from .precomputed import Precomputed
from .report import layer_line
from .working_linear import WorkingLinear

logger = logging.getLogger("hf_sparselr")

SHARED_ROWS = 2**24  # weights of a group from which its rows are worth sharing


def solve_layers(
    block: nn.Module,
    dense: nn.Module,
    layers: dict[str, Layer],
    groups: list[LayerGroup],
    hidden: list[torch.Tensor],
    calls: list[Call],
    config: SparseLRConfig,
    place: Workplace,
    phases: PhaseTimer,
    precomputed: Precomputed | None = None,
) -> list[dict]:
    """Replaces the planned layers of a block by `WorkingLinear`, group after group, and returns their report rows.

    The layers of a group share a Gram matrix and its factorisation.

    Args:
        block: FP32, on the compute device; changed in place.
        dense: the block whose weights errors are measured against, which may be the same.
        layers: {name in the block: its plan}.
        hidden, calls: the block's inputs.
        phases: gets the seconds.
        precomputed: decompositions to take over; nothing is solved then.

    Raises:
        ValueError, RuntimeError: naming the layer.
    """
    rows: dict[str, dict] = {}
    bar = transformers_logging.tqdm(total=len(layers), desc="  solving layers", leave=False, unit="layer")

    def install(name: str, result: Decomposition, row: dict) -> None:
        rows[name] = row
        logger.info(layer_line(row))
        module = block.get_submodule(name)
        block.set_submodule(name, WorkingLinear(result, module.bias, is_transposed(module)))
        bar.update()

    with phases("capture and Gram"):
        importance = _importance(block, layers, hidden, calls, config, place) if not precomputed else {}
    for group in groups:
        world = ALONE if group.experts else place.world
        problems = _problems(block, group, layers, hidden, calls, config, place, phases)
        for number, (names, gram, stats) in enumerate(problems):
            if group.experts and number % place.world.size != place.world.rank:
                continue  # another process solves this expert
            planned = [layers[name] for name in names]
            started = time.perf_counter()
            with naming(planned[0].name), phases("solve"):
                weights = [dense_weight(block.get_submodule(name)) for name in names]
                roots = [importance[name].sqrt()[:, None] if name in importance else None for name in names]
                scaled = [w if root is None else w * root for w, root in zip(weights, roots, strict=True)]
                results = _decompose(scaled, planned, gram, config, world, precomputed)
            for result, root in zip(results, roots, strict=True):
                phases.add(result.stats.pop("phases", {}))
                if root is not None:
                    result.scale_rows_(1 / root)
            seconds = (time.perf_counter() - started) / len(names)
            for name, layer, result in zip(names, planned, results, strict=True):
                weight = dense_weight(dense.get_submodule(name))
                install(name, result, {**_row(layer, weight, result, gram, seconds), **stats})
        for number, name in enumerate(group.layers if group.experts and place.world.size > 1 else ()):
            owner, own = number % place.world.size, (None, None)
            if owner == place.world.rank:
                own = block.get_submodule(name).decomposition(), rows[name]
            result, row = place.world.copy_of(own, owner, place.device)
            if owner != place.world.rank:
                install(name, result, row)
    bar.close()
    return [rows[name] for group in groups for name in group.layers]


def _importance(
    block: nn.Module,
    layers: dict[str, Layer],
    hidden: list[torch.Tensor],
    calls: list[Call],
    config: SparseLRConfig,
    place: Workplace,
) -> dict[str, torch.Tensor]:
    """The `output_weights` of the layers that are solved with such weights."""
    flat = [name for name, layer in layers.items() if layer.hierarchy is None]
    if not flat or not METHODS[config.method].weighs_outputs(config.method_options):
        return {}
    return output_weights(block, flat, hidden, calls, place)


def _problems(
    block: nn.Module,
    group: LayerGroup,
    layers: dict[str, Layer],
    hidden: list[torch.Tensor],
    calls: list[Call],
    config: SparseLRConfig,
    place: Workplace,
    phases: PhaseTimer,
) -> Iterator[tuple[list[str], ScaledGram, dict]]:
    """(layers that are solved together, their Gram matrix, its entries in the report): a group, or each expert."""
    if not group.experts:
        with phases("capture and Gram"), naming(layers[group.layers[0]].name):
            scaled = ScaledGram(gram_of_inputs(block, group, hidden, calls, place), config.damping)
        yield group.layers, scaled, {}
        return
    for layer, gram, tokens, share in grams_of_experts(block, group, hidden, calls, place):
        with naming(layers[layer].name):
            scaled = ScaledGram(gram, config.damping)
        yield [layer], scaled, {"tokens": tokens, "share": share}


def _decompose(
    weights: list[torch.Tensor],
    layers: list[Layer],
    gram: ScaledGram,
    config: SparseLRConfig,
    world: World,
    precomputed: Precomputed | None,
) -> list[Decomposition]:
    if precomputed:
        pairs = zip(layers, weights, strict=True)
        return [precomputed.decomposition(layer.name, weight) for layer, weight in pairs]
    method, options = METHODS[config.method], config.method_options
    together = method.shares_rows(options)
    if any(layer.hierarchy for layer in layers) or (world.size > 1 and not together):
        own = {
            number: _decompose_alone(layer, weight, gram, config)
            for number, (layer, weight) in enumerate(zip(layers, weights, strict=True))
            if number % world.size == world.rank
        }
        return [world.copy_of(own.get(n), n % world.size, gram.matrix.device) for n in range(len(layers))]
    sharing = world if sum(weight.numel() for weight in weights) >= SHARED_ROWS else ALONE
    results = None
    if sharing.size > 1 or world.first:
        patterns, ranks = [layer.pattern for layer in layers], [layer.rank for layer in layers]
        shared = {"world": sharing} if together else {}
        results = method.solve_group(weights, gram, patterns, ranks, options, config.seed, **shared)
    return results if sharing.size > 1 else world.copy_of(results, 0, gram.matrix.device)


def _decompose_alone(layer: Layer, weight: torch.Tensor, gram: ScaledGram, config: SparseLRConfig) -> Decomposition:
    method, options = METHODS[config.method], config.method_options
    if layer.hierarchy is None:
        return method.solve(weight, gram, layer.pattern, layer.rank, options, config.seed)
    permutation = config.hierarchy.permutation
    return method.solve_hierarchical(weight, gram, layer.pattern, layer.hierarchy, permutation, options, config.seed)


def _row(layer: Layer, weight: torch.Tensor, result: Decomposition, gram: ScaledGram, seconds: float) -> dict:
    """A layer's row of the report."""
    with matmuls("high"):  # of errors, not of what is stored
        error = gram.squared_error(weight - result.dense()) / max(gram.squared_error(weight), 1e-30)
    return {
        "name": layer.name,
        "shape": list(weight.shape),
        "pattern": str(layer.pattern),
        "rank": layer.rank,
        **({} if layer.hierarchy is None else {"ranks": list(layer.hierarchy.ranks)}),
        "sparsity": 1 - int(result.mask.sum()) / result.mask.numel(),
        "relative_error": error,
        "seconds": seconds,
        **result.stats,
    }


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts the name of a layer or block in front of an error's message."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
        raise type(error)(f"{name}: {error}") from error
