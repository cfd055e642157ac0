"""Compresses many models in many ways and compares each with its dense self.

    hf-sparselr bench quality MODEL... --sparsity 2:4 0.5 --refine none tm tm+distill published \\
        --calibration "books=file:train/*.txt" --eval "books=file:test/*.txt" "wiki=file:wiki.txt" --output DIR

A model is a Hub id or a directory. MODEL@TOKENS.safetensors takes its calibration windows (`calibration`) and
evaluation windows (all other tensors) from a file of token ids. Evaluate on text like the calibration's and on text
unlike it. `published` is 3BASiL-TM as its authors publish it. `8 bits` is the dense model rounded to 255 levels a row.

Every result is a line of DIR/results.jsonl. A second run of the command goes on where the first one ended. Several
processes may run the command with the same DIR at the same time: they share the work. The first seed of all models
comes first.
"""

import argparse
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..compression.plan import plan_layers
from ..config.sparselr_config import SparseLRConfig
from ..data.sources import read_files
from ..entrypoints.compress import compress
from ..format.patterns import from_text
from ..format.staging import write_text
from .measures import Passage, compare, last_word_accuracy, passages, round_to_8_bits, token_windows
from .methods import load, release
from .quality_tables import DENSE, PUBLISHED, REFINEMENTS, ROUNDED, markdown

try:
    import fcntl
except ImportError:  # not on Windows, where only one process may run the command
    fcntl = None


class Cell(NamedTuple):
    """What identifies a result."""

    model: str
    calibration: str
    sparsity: str
    rank: int
    refine: str
    seed: int

    def __str__(self) -> str:
        return " ".join(map(str, self))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a Hub id or a directory, or one with @TOKENS")
    parser.add_argument("--sparsity", nargs="+", default=["2:4", "0.5", "0.7"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--refine", nargs="+", default=["none", "tm", "tm+distill", PUBLISHED], choices=(*REFINEMENTS, PUBLISHED)
    )
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
    results = _Results(Path(args.output))
    for model in args.models:
        AutoConfig.from_pretrained(_path(model))
    cells = list(_cells(args))
    for _, cell in cells:  # checked before the first long run
        SparseLRConfig(**_fields(args, cell))
    subject, failed = None, []
    for model, cell in cells:
        with results.claimed(cell) as free:
            if not free:
                continue
            if subject is None or subject.model != model:
                subject = None  # its memory is free before the next one's is taken
                subject = _Subject(args, model)
            try:
                row = {**cell._asdict(), "device": _device_name(args.device), **subject.result(args, cell)}
            except Exception as error:  # hours of other results must not hang on one, which may only lack memory
                traceback.print_exc(limit=-3)
                failed.append(f"{cell}: {error}")
            else:
                results.add(row)
                print(_line(row), flush=True)
        release()
    print(markdown(results.rows()))
    if failed:
        raise ValueError(f"{len(failed)} results are missing. {'; '.join(failed)}")


def _device_name(device: str) -> str:
    """Results of different devices stand in one table: their last bits, and their seconds, differ."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _path(model: str) -> str:
    return model.partition("@")[0]


def _cells(args: argparse.Namespace) -> Iterator[tuple[str, Cell]]:
    """(model, cell) of everything that is measured."""
    for seed in args.seeds:
        for model in args.models:
            name = Path(_path(model)).name
            if seed == args.seeds[0]:
                for refine in (DENSE, ROUNDED):
                    yield model, Cell(name, "", "", 0, refine, 0)
            for calibration in ["tokens"] if "@" in model else dict(args.calibration):
                for sparsity in args.sparsity:
                    for refine in args.refine:
                        yield model, Cell(name, calibration, sparsity, args.rank, refine, seed)


def _fields(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Fields of SparseLRConfig that need no data."""
    if cell.refine in (DENSE, ROUNDED):  # the layers that are rounded are those that would be compressed
        return {"device": args.device, "rank": args.rank, **args.set}
    refine = {"none": None, PUBLISHED: "tm"}.get(cell.refine, cell.refine)
    fields = {"refine": refine, "seed": cell.seed, "device": args.device, "rank": cell.rank}
    fields["sparsity"] = from_text(cell.sparsity)
    return {**fields, **args.set, **({"effort": "published"} if cell.refine == PUBLISHED else {})}


class _Results:
    """The results in a folder, which several processes may fill together."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._locks = folder, folder / "locks"
        self._file = folder / "results.jsonl"
        self._locks.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        rows = map(_parsed, self._file.read_text("utf-8").splitlines())
        return [row for row in rows if row is not None]

    @contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Whether a cell is neither there nor in the works of another process; if so, it is this one's inside."""
        with (self._locks / str(cell).replace("/", "_")).open("w") as lock:
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield cell not in {Cell(*(row[name] for name in Cell._fields)) for row in self.rows()}

    def add(self, row: dict[str, Any]) -> None:
        with self._file.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in (b"", b"\n")
            line = "\n" * torn + json.dumps(row) + "\n"
            file.write(line.encode())  # in one call, so that lines of several processes stay whole
        write_text(self._folder / "results.md", markdown(self.rows()) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    """A result, or None for a line that its process was killed in: the cell is measured again."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class _Subject:
    """A dense model with its calibration and evaluation windows."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self.model = model
        self.path, _, tokens = model.partition("@")
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
        longest = min(args.seq_len, getattr(self.dense.config, "max_position_embeddings", args.seq_len))
        return passages(texts, self.tokenizer, args.passages, longest)

    def result(self, args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
        if cell.refine == DENSE:
            return {"bytes": 1.0, **self._measured(self.dense)}
        if cell.refine == ROUNDED:
            return self._rounded(args, cell)
        packed = compress(self.path, self._config(args, cell))
        report = packed.sparselr_report
        plain = packed.to(args.device, torch.float32).dequantize(torch.float32)
        size = report.sizes["packed"] / report.sizes["dense"]
        return {"bytes": size, "seconds": report.seconds, **self._measured(plain)}

    def _rounded(self, args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
        model = load(self.path, args.device).eval()
        size = 2 * sum(parameter.numel() for parameter in model.parameters())  # in half precision
        saved = round_to_8_bits(model, plan_layers(self.dense, SparseLRConfig(**_fields(args, cell))))
        return {"bytes": 1 - saved / size, **self._measured(model)}

    def _config(self, args: argparse.Namespace, cell: Cell) -> SparseLRConfig:
        source = self.calibrations[cell.calibration]
        given = isinstance(source, torch.Tensor)
        data = {
            "calibration": source,
            "num_samples": len(source) if given else args.num_samples,
            "seq_len": source.shape[1] if given else args.seq_len,
            "tokenizer": self.tokenizer,
        }
        return SparseLRConfig(**{**data, **_fields(args, cell)})

    def _measured(self, model: torch.nn.Module) -> dict[str, Any]:
        row: dict[str, Any] = {"sets": {name: compare(model, self.dense, ids) for name, ids in self.sets.items()}}
        if self.hidden:
            row["last word"] = last_word_accuracy(model, self.hidden)
        return row


def _line(row: dict[str, Any]) -> str:
    sets = [
        f"{name} {value['perplexity']:.3f} ({value['gap']:+.3f}), KL {value['kl']:.4f}"
        for name, value in row["sets"].items()
    ]
    seconds = f"; {row['seconds']:.0f} s" if "seconds" in row else ""
    return f"{Cell(*(row[name] for name in Cell._fields))}: {', '.join(sets)}{seconds}"
