"""Flat against hierarchical low-rank parts in a whole model, at equal bytes.

    hf-sparselr bench model-forms MODEL --tokens TOKENS.safetensors --sparsity 0.5 0.7 --rank 16 \\
        --targets q_proj k_proj v_proj --refine none tm --seeds 0 1 2 --output FILE

The bytes of 3BASiL with flat factors of that rank are the budget of all packed layers together. The nonzeros of S get
the bytes that blocks, leaves and orders leave, the same share of every layer. Models are compressed, saved, reloaded
and scored as by `bench methods`. sHSS looks at no calibration data: without refinement, its first seed stands for all.
"""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..compression.linear_layers import weight_shape
from ..compression.plan import plan_layers
from ..compression.report import table
from ..config.hierarchy import HierarchyOptions
from ..config.sparselr_config import SparseLRConfig
from ..format.patterns import Unstructured
from .forms import flat_bytes, hierarchical_bytes
from .methods import REFINEMENTS, Data, line, load, measure, release, run_config

Size = tuple[int, int]
FORMS: dict[str, tuple[str, str | None]] = {  # method, permutation
    "flat": ("3basil", None),
    "hss": ("3basil", None),
    "hss-rcm": ("3basil", "rcm"),
    "shss": ("shss", None),
    "shss-rcm": ("shss", "rcm"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Hub id or a directory")
    parser.add_argument("--tokens", required=True, help="a .safetensors file with `calibration` and evaluation windows")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5])
    parser.add_argument("--rank", type=int, default=16, help="of the flat factors")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--targets", nargs="+", help="names of layers; default: all")
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--first-ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--smallest-leaf", type=int, default=16)
    parser.add_argument("--refine", nargs="+", default=["none", "tm"], choices=REFINEMENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="other fields of SparseLRConfig")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", metavar="FILE", help="JSON, written after every run")


@dataclasses.dataclass(frozen=True)
class _Run:
    form: str
    budget: str
    first_rank: int | None
    config: SparseLRConfig


def run(args: argparse.Namespace) -> None:
    data = Data(args)
    dense = load(args.model, args.device)
    runs = list(_runs(args, data, dense))  # every configuration is checked before the first long run
    rows: list[dict[str, Any]] = [{"form": "dense", "perplexity": data.score(dense)}]
    del dense
    print(f"dense: {rows[0]['perplexity']}", flush=True)
    for planned in runs:
        release()
        result = measure(args, planned.config, data)
        print(f"{planned.form}, {planned.budget}, first rank {planned.first_rank}: {line(result)}", flush=True)
        of_run = {"form": planned.form, "budget": planned.budget, "first rank": planned.first_rank}
        rows.append({**result, **of_run})
        if args.output:
            Path(args.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(_table(rows))


def _runs(args: argparse.Namespace, data: Data, dense: torch.nn.Module) -> Iterator[_Run]:
    stored = AutoConfig.from_pretrained(args.model).dtype or torch.float32
    value = torch.empty(0, dtype=stored).element_size()
    for seed, refine, sparsity in itertools.product(args.seeds, args.refine, args.sparsity):
        budget = f"{sparsity:g}, rank {args.rank}"
        flat = run_config(args, data, "3basil", refine, seed, sparsity=sparsity, rank=args.rank, targets=args.targets)
        sizes = [weight_shape(dense.get_submodule(name)) for name in plan_layers(dense, flat)]
        for form in args.forms:
            method, permutation = FORMS[form]
            if form == "flat":
                yield _Run(form, budget, None, flat)
                continue
            if method == "shss" and refine == "none" and seed != args.seeds[0]:
                continue
            for first_rank in args.first_ranks:
                options = HierarchyOptions(args.depth, smallest_leaf=args.smallest_leaf, permutation=permutation)
                zeros = equal_sparsity(sizes, sparsity, args.rank, options, first_rank, value)
                if zeros is None:
                    print(f"{form}, {budget}, first rank {first_rank}: nothing is left for S", flush=True)
                    continue
                fields = {"sparsity": zeros, "rank": first_rank, "low_rank": "hss", "hierarchy": options}
                config = run_config(args, data, method, refine, seed, targets=args.targets, **fields)
                plan_layers(dense, config)
                yield _Run(form, budget, first_rank, config)


def equal_sparsity(
    sizes: list[Size], sparsity: float, rank: int, options: HierarchyOptions, first_rank: int, value: int
) -> float | None:
    """The zeros of S with which layers take the bytes of S and flat factors; None where nothing is left for S.

    Args:
        sizes: (out, in) of every layer.
        sparsity, rank: with flat factors.
        options, first_rank: of the hierarchies.
        value: bytes of a weight.
    """
    budget = sum(flat_bytes(size, Unstructured(sparsity).kept(size), rank, value) for size in sizes)
    for size in sizes:
        shape = options.shape(size, first_rank)
        if shape is None:
            budget -= flat_bytes(size, 0, first_rank, value)
        else:
            budget -= hierarchical_bytes(shape, 0, options.permutation is not None, value)
    kept = budget / value / sum(map(math.prod, sizes))
    return round(1 - kept, 6) if kept > 0 else None


def _table(rows: list[dict[str, Any]]) -> str:
    """Every perplexity beside its distance from the dense model's."""
    sets = list(rows[0]["perplexity"])
    names = ("budget", "form", "first rank", "sparsity", "refine", "seed")
    lines = [(*names, "layer error", *sets, "s", "bytes")]
    for row in rows[1:]:
        cells = [str(row[name] if row[name] is not None else "") for name in names]
        scores = (
            f"{row['perplexity'][name]:.2f} ({row['perplexity'][name] - rows[0]['perplexity'][name]:+.2f})"
            for name in sets
        )
        lines.append((*cells, f"{row['layer_error']:.5f}", *scores, f"{row['seconds']:.0f}", f"{row['bytes']:,}"))
    return table(lines)
