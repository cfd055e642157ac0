"""Compresses one model in many ways and scores each on the same text.

    hf-sparselr bench methods MODEL --sparsity 2:4 0.5 --rank 16 --methods 3basil oats --refine none tm \\
        --calibration "file:train/*.txt" --eval "file:test/*.txt" --output DIR

Every model is compressed, saved, reloaded and scored in FP32. After every model, results.md and results.json are
written to DIR; at the end also results.png (perplexity against bytes), if matplotlib is installed.
"""

import argparse
import gc
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..compression.linear_layers import weight_shape
from ..compression.plan import plan_layers
from ..config.sparselr_config import SparseLRConfig
from ..entrypoints.compress import compress
from ..entrypoints.perplexity import perplexity
from ..format.patterns import from_text, parse
from ..solvers.registry import METHODS, PRECOMPUTED

_MARKERS = {"none": "o", "tm": "^", "distill": "s", "tm+distill": "D"}
REFINEMENTS = tuple(_MARKERS)
_COLORS = (*range(0, 20, 2), *range(1, 20, 2))  # indices into tab20: strong colours first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Hub id or a directory")
    parser.add_argument("--sparsity", nargs="+", default=["2:4"])
    parser.add_argument("--rank", nargs="+", type=int, default=[16], help="pure pruners run at rank 0 only")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["3basil"],
        choices=[name for name in METHODS if name != PRECOMPUTED],
        metavar="METHOD",
    )
    parser.add_argument("--refine", nargs="+", default=["none", "tm"], choices=REFINEMENTS)
    parser.add_argument("--equal-size", action="store_true", help="pure pruners also at the bytes of S + B A")
    parser.add_argument("--calibration", default="self", help='"self", "file:GLOB" or a Hub data set')
    parser.add_argument("--eval", nargs="+", default=[], help='"file:GLOB" or Hub data sets')
    parser.add_argument(
        "--tokens",
        help="instead of both: a .safetensors file with `calibration` and evaluation windows of token ids",
    )
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="other fields of SparseLRConfig")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", metavar="DIR", help="where results.md, .json and .png go")


def run(args: argparse.Namespace) -> None:
    transformers_logging.disable_progress_bar()
    data = Data(args)
    configs = list(_configs(args, data))  # every configuration is checked before the first long run
    dense = load(args.model, args.device)
    for config in configs:
        plan = plan_layers(dense, config)
    shapes = [weight_shape(dense.get_submodule(name)) for name in plan]
    configs += _equal_size(args, data, shapes)
    rows = [{"method": "dense", "seconds": 0.0, "bytes": dense_bytes(dense), "perplexity": data.score(dense)}]
    del dense
    print(line(rows[0]), flush=True)
    for config in configs:
        release()
        rows.append(measure(args, config, data))
        print(line(rows[-1]), flush=True)
        if args.output:
            _write(Path(args.output), rows)
    print(markdown(rows))
    if args.output:
        _draw(rows, Path(args.output))


def release() -> None:
    """Frees objects that only reference cycles keep alive, and returns the private GPU memory of dead CUDA graphs."""
    gc.collect()
    torch.cuda.empty_cache()


class Data:
    """Calibration and evaluation sets, token ids or sources of text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = None
        if args.tokens:
            from safetensors.torch import load_file

            tokens = load_file(args.tokens)
            if "calibration" not in tokens or len(tokens) < 2:
                raise ValueError(
                    f"--tokens {args.tokens}: it has {sorted(tokens)}, expected `calibration` and a set to score on"
                )
            self.calibration = tokens.pop("calibration").long()
            self.sets: dict[str, Any] = {name: ids.long() for name, ids in tokens.items()}
            self.samples, self.length = self.calibration.shape
            return
        if not args.eval:
            raise ValueError("--eval is empty: name text to score on, or pass --tokens")
        self.calibration, self.samples, self.length = args.calibration, args.num_samples, args.seq_len
        self.sets = {source: source for source in args.eval}
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)

    def score(self, model: Any) -> dict[str, float]:
        options = {} if self.tokenizer is None else {"seq_len": self.length}
        return {name: perplexity(model, ids, self.tokenizer, **options) for name, ids in self.sets.items()}


def run_config(args: argparse.Namespace, data: Data, method: str, refine: str, seed: int, **fields) -> SparseLRConfig:
    return SparseLRConfig(
        method=method,
        refine=None if refine == "none" else refine,
        seed=seed,
        calibration=data.calibration,
        num_samples=data.samples,
        seq_len=data.length,
        tokenizer=data.tokenizer,
        device=args.device,
        **{**fields, **args.set},
    )


def _configs(args: argparse.Namespace, data: Data) -> Iterator[SparseLRConfig]:
    """Every combination once: pure pruning at rank 0 only, low rank alone at every rank but 0."""
    grid = itertools.product(args.sparsity, args.methods, args.rank, args.refine, args.seeds)
    runs = {}
    for sparsity, name, rank, refine, seed in grid:
        method = METHODS[name]
        if method.sparse or rank or not any(args.rank):
            pattern = from_text(sparsity) if method.sparse else None
            runs[name, refine, seed, pattern, rank if method.low_rank else 0] = None
    for name, refine, seed, pattern, rank in runs:
        yield run_config(args, data, name, refine, seed, sparsity=pattern, rank=rank)


def _equal_size(args: argparse.Namespace, data: Data, shapes: list[tuple[int, int]]) -> Iterator[SparseLRConfig]:
    """Configurations of pure pruning whose S has as many parameters as S + B A at each sparsity and rank."""
    if not args.equal_size:
        return
    pruners = [name for name in args.methods if not METHODS[name].low_rank]
    if not pruners or not any(args.rank):
        raise ValueError("--equal-size: expected a pure pruner among --methods, and a --rank > 0 to match")
    grid = itertools.product(pruners, args.sparsity, filter(None, args.rank), args.refine, args.seeds)
    for name, sparsity, rank, refine, seed in grid:
        pattern = parse(from_text(sparsity))
        kept = sum(pattern.kept(shape) + rank * sum(shape) for shape in shapes)
        zeros = 1 - kept / sum(map(math.prod, shapes))
        yield run_config(args, data, name, refine, seed, sparsity=round(zeros, 6), rank=0)


def measure(args: argparse.Namespace, config: SparseLRConfig, data: Data) -> dict[str, Any]:
    model = compress(args.model, config)
    report = model.sparselr_report
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        scores = data.score(load(folder, args.device))
    errors = [row["relative_error"] for row in report.layers]
    return {
        "method": config.method,
        "sparsity": config.sparsity,
        "rank": config.rank,
        "refine": config.refine,
        "seed": config.seed,
        "layer_error": sum(errors) / len(errors),
        "seconds": report.seconds,
        "bytes": report.sizes["packed"],
        "perplexity": scores,
        "phases": _phases(report),
    }


def _phases(report: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for block in report.blocks:
        for name, seconds in block["phases"].items():
            total[name] = total.get(name, 0.0) + seconds
    return {**total, "distill": report.distill["seconds"]} if report.distill else total


def load(path: str, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)


def dense_bytes(model: torch.nn.Module) -> int:
    """Of the dense checkpoint, in the dtype it is stored in; tied tensors once."""
    size = torch.empty(0, dtype=getattr(model.config, "dtype", None) or torch.float32).element_size()
    return sum(parameter.numel() for parameter in model.parameters()) * size


def markdown(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table; every perplexity beside its distance from the dense model's."""
    sets = list(rows[0]["perplexity"])
    header = ["method", "sparsity", "rank", "refine", "seed", "layer error", *sets, "s", "MB"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [str(row.get(name, "") if row.get(name) is not None else "") for name in header[:5]]
        cells.append(f"{row['layer_error']:.5f}" if "layer_error" in row else "")
        for name in sets:
            value = row["perplexity"][name]
            gap = value - rows[0]["perplexity"][name]
            cells.append(f"{value:.2f} ({gap:+.2f})" if row is not rows[0] else f"{value:.2f}")
        cells += [f"{row['seconds']:.0f}", f"{row['bytes'] / 1e6:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    settings = " ".join(str(row[name]) for name in ("method", "sparsity", "rank", "refine", "seed") if name in row)
    scores = ", ".join(f"{name} {value:.3f}" for name, value in row["perplexity"].items())
    return f"{settings}: {scores}, {row['seconds']:.1f} s, {row['bytes']:,} bytes"


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _draw(rows: list[dict[str, Any]], folder: Path) -> None:
    try:
        plot(rows, folder / "results.png")
    except ImportError:
        print("no results.png: matplotlib is not installed (the `plot` extra)")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity on the first evaluation set against bytes: a colour a method, a marker a refinement.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    name = next(iter(rows[0]["perplexity"]))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(rows[0]["perplexity"][name], color="gray", linestyle="--", label="dense")
    methods = dict.fromkeys(row["method"] for row in rows[1:])
    colors = {method: colormaps["tab20"].colors[index] for method, index in zip(methods, _COLORS, strict=False)}
    used = {row["refine"] or "none": None for row in rows[1:]}

    def draw(xs: list[float], ys: list[float], refine: str, color: Any, label: str | None = None) -> None:
        face = "none" if refine == "none" else color
        axes.plot(xs, ys, _MARKERS[refine], color=color, markerfacecolor=face, label=label)

    for row in rows[1:]:
        draw([row["bytes"] / 1e6], [row["perplexity"][name]], row["refine"] or "none", colors[row["method"]])
    for method, color in colors.items():  # draws no point, only an entry of the legend
        axes.plot([], [], "o", color=color, label=method)
    for refine in used:
        draw([], [], refine, "black", "no refinement" if refine == "none" else refine)
    axes.set(xlabel="MB on disk", ylabel=f"perplexity on {name}", yscale="log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
