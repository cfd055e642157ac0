"""Flat against hierarchical low-rank parts, at equal bytes, layer by layer.

    hf-sparselr bench forms LAYER.safetensors ... --sparsity 0.5 0.7 --rank 16 --output FILE

A file holds `weight` (out, in) and `gram` (in, in). The bytes of 3BASiL with a flat low-rank part of that rank are the
budget. The nonzeros of S get the bytes that a hierarchy's blocks, leaves and orders leave: two bytes a value, a
bit a weight for the mask, four bytes an index of an order. Of all depths and first ranks that fit the best one counts,
chosen for each method by its own error (for 3BASiL with effort "fast"). Errors are tr(E H E^T) / tr(W H W^T).
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..compression.report import table
from ..config.hierarchy import HierarchyOptions
from ..config.presets import PRESETS
from ..format.decomposition import Decomposition
from ..format.hierarchy import HierarchyShape
from ..format.patterns import EMPTY, Pattern, Unstructured
from ..solvers import shss, svd, threebasil
from ..solvers.gram import ScaledGram, squared_error
from ..solvers.registry import METHODS

VALUE, INDEX = 2, 4  # bytes
METHODS_HERE = ("shss", "3basil", "svd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layers", nargs="+", help="safetensors files")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--first-ranks", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--permutations", nargs="+", default=["none", "rcm", "random"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", metavar="FILE", help="JSON, written after every row")


def run(args: argparse.Namespace) -> None:
    rows: list[dict] = []
    for file, sparsity in itertools.product(args.layers, args.sparsity):
        tensors = {name: tensor.to(args.device) for name, tensor in load_file(file).items()}
        layer = _Layer(Path(file).stem, tensors["weight"], tensors["gram"])
        for row in _rows(layer, sparsity, args):
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            if args.output:
                Path(args.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    header = ("layer", "budget", "method", "permutation", "ranks", "kept", "bytes", "error", "against flat")
    print(table([header, *(tuple(str(row.get(key, "-")) for key in header) for row in rows)]))


class _Layer:
    def __init__(self, name: str, weight: torch.Tensor, gram: torch.Tensor) -> None:
        self.name, self.weight, self.H = name, weight.float(), gram.float()
        self.gram = ScaledGram(gram)
        self.shape = (weight.shape[0], weight.shape[1])

    @property
    def dense_bytes(self) -> int:
        return VALUE * math.prod(self.shape)

    def error(self, result: Decomposition) -> float:
        return squared_error(self.weight - result.dense(), self.H) / squared_error(self.weight, self.H)


def flat_bytes(shape: tuple[int, int], kept: int, rank: int, value: int = VALUE) -> int:
    """Of values, mask, A and B; `value`: bytes of one."""
    return value * (kept + rank * sum(shape)) + -(-shape[1] // 8) * shape[0]


def hierarchical_bytes(shape: HierarchyShape, kept: int, permuted: bool, value: int = VALUE) -> int:
    """Of values, mask, blocks, leaves, ranks and orders."""
    size = (shape.out_features, shape.in_features)
    return flat_bytes(size, kept, 0, value) + value * shape.parameters + INDEX * (shape.depth + permuted * sum(size))


def _rows(layer: _Layer, sparsity: float, args: argparse.Namespace) -> Iterator[dict]:
    pattern = Unstructured(sparsity)
    kept = pattern.kept(layer.shape)
    budget, label = flat_bytes(layer.shape, kept, args.rank), f"{sparsity:g}, rank {args.rank}"

    def row(method: str, result: Decomposition, size: int, flat: float | None, **more: Any) -> dict:
        error = layer.error(result)
        return {
            "layer": layer.name,
            "budget": label,
            "method": method,
            **more,
            "kept": round(int(result.mask.sum()) / result.mask.numel(), 4),
            "bytes": round(size / layer.dense_bytes, 4),
            "error": round(error, 6),
            "against flat": round(error / flat, 3) if flat else 1.0,
        }

    options = threebasil.Options(**PRESETS["default"]["3basil"])
    flat = threebasil.solve(layer.weight, layer.gram, pattern, args.rank, options)
    least = layer.error(flat)
    yield row("3basil, flat", flat, budget, None)
    rank = (budget - flat_bytes(layer.shape, 0, 0)) // (VALUE * sum(layer.shape))
    alone = svd.solve(layer.weight, layer.gram, EMPTY, min(rank, min(layer.shape) - 1), svd.Options())
    yield row("svd, flat", alone, flat_bytes(layer.shape, 0, rank), least, ranks=[rank])
    magnitudes = shss.solve(layer.weight, layer.gram, pattern, args.rank, shss.Options())
    yield row("magnitude + svd, flat", magnitudes, budget, least, ranks=[args.rank])
    for method in METHODS_HERE:
        shape = _best(layer, method, budget, args)
        for permutation in args.permutations if shape else ():
            solved = _solve(layer, method, shape, budget, permutation, "default")
            if solved is not None:
                yield row(method, *solved, least, permutation=permutation, ranks=list(shape.ranks))


def _best(layer: _Layer, method: str, budget: int, args: argparse.Namespace) -> HierarchyShape | None:
    """The hierarchy of the least error without a permutation."""
    candidates = {
        HierarchyOptions(depth).shape(layer.shape, rank)
        for depth, rank in itertools.product(args.depths, args.first_ranks)
    }
    fitting = [shape for shape in candidates if shape and not shape.problem()]
    if method == "svd":  # the bytes that S would take go to the ranks
        fitting = [shape for shape in map(lambda shape: _widened(layer, shape, budget), fitting) if shape]
    errors = {}
    for shape in sorted(set(fitting), key=lambda shape: shape.ranks):
        solved = _solve(layer, method, shape, budget, "none", "fast")
        if solved is not None:
            errors[shape] = layer.error(solved[0])
    return min(errors, key=errors.get) if errors else None


def _widened(layer: _Layer, shape: HierarchyShape, budget: int) -> HierarchyShape | None:
    """The same depth at the largest first rank that the budget allows."""
    best = None
    for rank in range(1, min(layer.shape) // 2):
        wider = HierarchyOptions(shape.depth).shape(layer.shape, rank)
        if wider.problem() or hierarchical_bytes(wider, 0, True) > budget:
            break
        best = wider
    return best


def _solve(
    layer: _Layer, method: str, shape: HierarchyShape, budget: int, permutation: str, effort: str
) -> tuple[Decomposition, int] | None:
    """The decomposition at the budget and its bytes; None where nothing is left for S."""
    permuted = permutation != "none"
    kept = 0 if method == "svd" else (budget - hierarchical_bytes(shape, 0, permuted)) // VALUE
    if kept < 0 or (not kept and method != "svd"):
        return None
    pattern: Pattern = Unstructured.keeping(kept, math.prod(layer.shape))
    options = METHODS[method].options(**PRESETS[effort].get(method, {}))
    shuffled = _shuffled(layer) if permutation == "random" else layer
    result = METHODS[method].solve_hierarchical(
        shuffled.weight, shuffled.gram, pattern, shape, "rcm" if permutation == "rcm" else None, options, 0
    )
    if permutation == "random":
        result = _unshuffled(layer, result)
    return result, hierarchical_bytes(shape, int(result.mask.sum()), permuted)


def _orders(layer: _Layer) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randperm(n, generator=generator).to(layer.weight.device) for n in layer.shape)


def _shuffled(layer: _Layer) -> _Layer:
    rows, columns = _orders(layer)
    return _Layer(layer.name, layer.weight[rows][:, columns], layer.H[columns][:, columns])


def _unshuffled(layer: _Layer, result: Decomposition) -> Decomposition:
    rows, columns = (torch.argsort(order) for order in _orders(layer))
    S, mask = (matrix[rows][:, columns] for matrix in (result.S, result.mask))
    result.hierarchy.row_order, result.hierarchy.column_order = (o.int() for o in _orders(layer))
    return Decomposition(S, mask, hierarchy=result.hierarchy)
