"""Compresses many models in many ways and compares each with its dense self.

    hf-sparselr bench quality MODEL... --sparsity 2:4 0.5 --refine none tm tm+distill published \\
        --calibration "books=file:train/*.txt" --eval "books=file:test/*.txt" "wiki=file:wiki.txt" --output DIR

A model is a Hub id or a directory. MODEL@TOKENS.safetensors takes its calibration windows (`calibration`) and
evaluation windows (all other tensors) from a file of token ids. Evaluate on text like the calibration's and on text
unlike it. `published` is 3BASiL-TM as its authors publish it; the last column is the geometric mean of the gaps on all
evaluation texts, as shares of its gaps. The row `8 bits` is the dense model rounded to 255 levels a row.

Every result is a line of DIR/results.jsonl. A second run of the command goes on where the first one ended.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..compression.plan import plan_layers
from ..config.sparselr_config import SparseLRConfig
from ..data.sources import read_files
from ..entrypoints.compress import compress
from ..format.patterns import from_text
from .measures import Passage, compare, last_word_accuracy, passages, round_to_8_bits, token_windows
from .methods import load, release

REFINEMENTS = ("none", "tm", "distill", "tm+distill", "published")
ROUNDED = "8 bits"
_KEY = ("model", "calibration", "sparsity", "rank", "refine", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a Hub id or a directory, or one with @TOKENS")
    parser.add_argument("--sparsity", nargs="+", default=["2:4", "0.5", "0.7"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--refine", nargs="+", default=["tm", "tm+distill", "published"], choices=REFINEMENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--calibration", nargs="+", default=[], type=_named, metavar="NAME=SRC")
    parser.add_argument("--eval", nargs="+", default=[], type=_named, metavar="NAME=file:GLOB")
    parser.add_argument("--last-word", metavar="file:GLOB", help="books whose paragraphs have their last word hidden")
    parser.add_argument("--passages", type=int, default=400, help="of --last-word")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=200, help="most windows of an evaluation text")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="other fields of SparseLRConfig")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", metavar="DIR", required=True, help="of results.jsonl and results.md")


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=SOURCE")
    return name, source


def run(args: argparse.Namespace) -> None:
    transformers_logging.disable_progress_bar()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []
    for model in args.models:
        for row in _model_rows(args, model, {_key(row) for row in rows}):
            rows.append(row)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(_line(row), flush=True)
            (folder / "results.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    print(markdown(rows))


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in _KEY)


class _Subject:
    """A dense model with its calibration and evaluation windows."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self.path, _, tokens = model.partition("@")
        self.name = Path(self.path).name
        self.dense = AutoModelForCausalLM.from_pretrained(self.path, dtype="auto")
        self.dense.requires_grad_(False).to(args.device, torch.float32).eval()
        self.tokenizer = None
        if not tokens or args.last_word:
            self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        if tokens:
            from safetensors.torch import load_file

            sets = {name: ids.long() for name, ids in load_file(tokens).items()}
            if "calibration" not in sets or len(sets) < 2:
                raise ValueError(f"{model}: {tokens} has {sorted(sets)}, expected `calibration` and a set to score on")
            self.calibrations: dict[str, Any] = {"tokens": sets.pop("calibration")}
        else:
            if not args.calibration or not args.eval:
                raise ValueError(
                    f"{model}: name texts with --calibration and --eval, or pass {model}@TOKENS.safetensors"
                )
            self.calibrations = dict(args.calibration)
            sets = {name: self._windows(args, source) for name, source in args.eval}
        self.sets = {name: ids[:: max(1, len(ids) // args.windows)][: args.windows] for name, ids in sets.items()}
        self.hidden = self._passages(args)

    def _windows(self, args: argparse.Namespace, source: str) -> torch.Tensor:
        return token_windows(read_files(source, f"--eval {source}"), self.tokenizer, args.seq_len)

    def _passages(self, args: argparse.Namespace) -> list[Passage]:
        if not args.last_word:
            return []
        texts = read_files(args.last_word, f"--last-word {args.last_word}")
        return passages(texts, self.tokenizer, args.passages, args.seq_len)

    def config(
        self, args: argparse.Namespace, calibration: str, refine: str, seed: int, **fields: Any
    ) -> SparseLRConfig:
        source = self.calibrations[calibration]
        given = isinstance(source, torch.Tensor)
        options = {"effort": "published"} if refine == "published" else {}
        refine = "tm" if refine == "published" else refine
        return SparseLRConfig(
            refine=None if refine == "none" else refine,
            seed=seed,
            calibration=source,
            num_samples=len(source) if given else args.num_samples,
            seq_len=source.shape[1] if given else args.seq_len,
            tokenizer=self.tokenizer,
            device=args.device,
            **{**fields, **args.set, **options},
        )

    def measured(self, model: torch.nn.Module) -> dict[str, Any]:
        row: dict[str, Any] = {"sets": {name: compare(model, self.dense, ids) for name, ids in self.sets.items()}}
        if self.hidden:
            row["last word"] = last_word_accuracy(model, self.hidden)
        return row


def _model_rows(args: argparse.Namespace, name: str, done: set[tuple]) -> Iterator[dict[str, Any]]:
    """The rows of a model that are not done yet."""
    subject = _Subject(args, name)
    jobs = []
    grid = itertools.product(subject.calibrations, args.sparsity, args.refine, args.seeds)
    for calibration, sparsity, refine, seed in grid:
        head = (subject.name, calibration, sparsity, args.rank, refine, seed)
        fields = {"sparsity": from_text(sparsity), "rank": args.rank}
        # Checked before the first long run.
        jobs.append((head, subject.config(args, calibration, refine, seed, **fields)))
    plan = plan_layers(subject.dense, jobs[0][1])
    size = 2 * sum(parameter.numel() for parameter in subject.dense.parameters())  # in half precision
    for refine in ("dense", ROUNDED):
        head = (subject.name, "", "", 0, refine, 0)
        if head in done:
            continue
        model, saved = subject.dense, 0
        if refine == ROUNDED:
            model = load(subject.path, args.device).eval()
            saved = round_to_8_bits(model, plan)
        yield {**dict(zip(_KEY, head, strict=True)), "bytes": 1 - saved / size, **subject.measured(model)}
        del model
    for head, config in jobs:
        if head in done:
            continue
        packed = compress(subject.path, config)
        report = packed.sparselr_report
        head_and_size = {**dict(zip(_KEY, head, strict=True)), "bytes": report.sizes["packed"] / report.sizes["dense"]}
        yield {**head_and_size, "seconds": report.seconds, **subject.measured(packed.to(args.device, torch.float32))}
        del packed
        release()


def _line(row: dict[str, Any]) -> str:
    sets = ", ".join(f"{name} {value['perplexity']:.3f} ({value['gap']:+.3f})" for name, value in row["sets"].items())
    return f"{' '.join(str(row[name]) for name in _KEY)}: {sets}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Tables of means over seeds: a row a model, calibration, pattern and refinement; then shares of `published`."""
    names = list(dict.fromkeys(name for row in rows for name in row["sets"]))
    header = ["model", "calibration", "sparsity", "refine", "bytes", "seconds"]
    for name in names:
        header += [f"{name}: gap", "KL", "same top token"]
    header += ["last word", "share of published"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_key(row)[:-1], []).append(row)
    for key, group in groups.items():
        cells = [str(key[0]), str(key[1]), str(key[2]), str(key[4]), f"{group[0]['bytes']:.3f}"]
        cells.append(f"{_mean([row['seconds'] for row in group]):.0f}" if "seconds" in group[0] else "")
        for name in names:
            values = [row["sets"][name] for row in group if name in row["sets"]]
            if not values:
                cells += ["", "", ""]
            elif key[4] == "dense":
                cells += [f"{values[0]['perplexity']:.2f} (dense)", "", ""]
            else:
                cells += [_seeds([value["gap"] for value in values])]
                cells += [f"{_mean([value[field] for value in values]):.4f}" for field in ("kl", "agreement")]
        cells.append(f"{_mean([row['last word'] for row in group]):.3f}" if "last word" in group[0] else "")
        shares = _shares(groups, key)
        cells.append(f"{_geometric(shares):.2f}" if shares else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_summary(groups)])


def _shares(groups: dict[tuple, list[dict[str, Any]]], key: tuple) -> list[float]:
    """The gaps as shares of those of `published`, an evaluation text each; none where that gap is not above zero."""
    published = groups.get((*key[:4], "published"))
    if published is None:
        return []
    shares = []
    for name in published[0]["sets"]:
        theirs, own = (_mean([row["sets"][name]["gap"] for row in rows]) for rows in (published, groups[key]))
        if theirs > 0:
            shares.append(max(own, 0.0) / theirs)
    return shares


def _summary(groups: dict[tuple, list[dict[str, Any]]]) -> Iterator[str]:
    """The geometric mean and the largest share of `published` of each refinement, over everything that was measured."""
    refinements = dict.fromkeys(key[4] for key in groups)
    for refine in refinements:
        shares = [share for key in groups if key[4] == refine for share in _shares(groups, key)]
        if shares and refine != "published":
            mean = f"{_geometric(shares):.3f} of the published gap (geometric mean)"
            yield f"{refine}: {mean}, at most {max(shares):.3f}."


def _geometric(values: list[float]) -> float:
    """The geometric mean; a value below 0.01 counts as 0.01, so that one of zero does not decide alone."""
    return math.exp(_mean([math.log(max(value, 0.01)) for value in values]))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _seeds(values: list[float]) -> str:
    """The mean, and the extremes of several seeds."""
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{_mean(values):.2f}{spread}"
