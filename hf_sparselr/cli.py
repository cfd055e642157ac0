"""The command `hf-sparselr`: compress a model, measure perplexity, look into a checkpoint, run benchmarks."""

import argparse
import inspect
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from . import bench
from .config.options import ALLOCATION_OPTIONS
from .config.presets import PRESETS
from .config.sparselr_config import SparseLRConfig
from .entrypoints.compress import compress
from .entrypoints.inspect import inspect_checkpoint
from .entrypoints.perplexity import perplexity
from .format.patterns import from_text
from .solvers.registry import METHODS, PRECOMPUTED

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_JSON_FIELDS = ("overrides", "allocation_options", "method_options", "tm", "distill")


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0, or 2 after an error, told in one line on stderr. Arguments that cannot be parsed exit with
        2 as argparse does it.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"hf-sparselr: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-sparselr", description="Sparse plus low-rank compression of transformers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compress(commands.add_parser("compress", help="compress a model and write the packed checkpoint"))
    _add_eval(commands.add_parser("eval", help="perplexity of a model, compressed or not"))
    _add_inspect(commands.add_parser("inspect", help="what a compressed checkpoint holds"))
    bench.add_parsers(
        commands.add_parser("bench", help="measure methods, compression speed, kernels, generation")
    )
    return parser


def _add_options(parser: argparse.ArgumentParser, owner: Any, options: dict[str, dict]) -> None:
    """Options that set arguments of `owner`, whose defaults hold for those that are not given."""
    parameters = inspect.signature(owner).parameters
    for name, details in options.items():
        default = parameters[name].default
        text = details.pop("help") + (f" (default: {default})" if default is not None else "")
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **details)


def _given(args: argparse.Namespace, owner: Any) -> dict[str, Any]:
    """The arguments of `owner` that were given."""
    return {name: value for name, value in vars(args).items() if name in inspect.signature(owner).parameters}


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_compress)
    parser.add_argument("name", help="a Hub id or a directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write the checkpoint")
    integer = {"type": int, "metavar": "N"}
    regexes = {"nargs": "+", "metavar": "RE"}
    options = {
        "sparsity": {"type": from_text, "help": '"n:m" or the fraction of zeros'},
        "rank": {**integer, "help": "rank of the low-rank part"},
        "compression": {
            "type": float,
            "metavar": "C",
            "help": "share of the parameters to remove, in the place of sparsity and rank",
        },
        "rank_ratio": {"type": float, "metavar": "K", "help": "share of what it keeps for the low-rank part"},
        "allocation": {"choices": tuple(ALLOCATION_OPTIONS), "help": "of sparsity and rank to the layers"},
        "allocation_options": {"metavar": "JSON", "help": "options of the allocation"},
        "method": {"choices": tuple(name for name in METHODS if name != PRECOMPUTED), "help": "layer solver"},
        "refine": {
            "choices": ("tm", "distill", "tm+distill", "none"),
            "help": "what follows the layer solves",
        },
        "effort": {"choices": tuple(PRESETS), "help": "sets what method_options, tm and distill leave open"},
        "calibration": {"metavar": "SRC", "help": '"self", "file:GLOB" or a Hub data set "id[:config]"'},
        "num_samples": {**integer, "help": "calibration windows"},
        "seq_len": {**integer, "help": "tokens a window"},
        "batch_size": {**integer, "help": "windows at a time"},
        "seed": {**integer, "help": "of windows, start and order"},
        "targets": {**regexes, "help": "layers to compress; all linear layers of the blocks if not given"},
        "ignore": {**regexes, "help": "layers to leave alone"},
        "overrides": {"metavar": "JSON", "help": '{"RE": {"sparsity": ..., "rank": ..., "skip": ...}}'},
        "method_options": {"metavar": "JSON", "help": "options of the method"},
        "tm": {"metavar": "JSON", "help": "options of transformer matching"},
        "distill": {"metavar": "JSON", "help": "options of distillation"},
        "on_incompatible": {"choices": ("error", "skip"), "help": "for layers that do not fit the pattern"},
        "device": {
            "metavar": "D",
            "help": "where blocks are worked on; CUDA where there is one if not given",
        },
        "activations": {"choices": ("device", "host"), "help": "where hidden states of all windows are kept"},
    }
    _add_options(parser, SparseLRConfig, options)
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (default: auto)")
    parser.add_argument("--push", metavar="REPO_ID", help="also push to this Hub repository")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_eval)
    parser.add_argument("path", help="a directory or a Hub id")
    parser.add_argument(
        "--data",
        metavar="SRC",
        default=WIKITEXT,
        help=f'"file:GLOB" or a Hub data set "id[:config]", of which the test split is read (default: {WIKITEXT})',
    )
    integer = {"type": int, "metavar": "N"}
    options = {
        "seq_len": {**integer, "help": "tokens a window, bounded by the model's context"},
        "stride": {**integer, "help": "tokens between windows; windows do not overlap if not given"},
        "batch_size": {**integer, "help": "windows at a time"},
    }
    _add_options(parser, perplexity, options)
    parser.add_argument("--device", metavar="D", help="CUDA where there is one if not given")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_inspect)
    parser.add_argument("path", help="a directory or a Hub id")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _compress(args: argparse.Namespace) -> None:
    fields = _given(args, SparseLRConfig)
    for name in _JSON_FIELDS:
        if name in fields:
            fields[name] = _json(name, fields[name])
    if fields.get("refine") == "none":
        fields["refine"] = None
    if "device" in fields:
        _check_device(fields["device"])
    config = SparseLRConfig(**fields)
    if args.push:
        HfApi().whoami()  # a missing token should not come up after hours of work
    with _log_lines():
        model = compress(args.name, config, output_dir=args.output, dtype=args.dtype)
    report = model.sparselr_report
    print(report)
    dense, packed = report.sizes["dense"], report.sizes["packed"]
    print(f"{dense:,} bytes dense, {packed:,} packed ({packed / dense:.2%}), {report.seconds:.1f} s")
    print(f"written to {args.output}")
    if args.push:
        _push(model, args.output, args.push)
        print(f"pushed to {args.push}")


def _push(model: Any, directory: str, repo_id: str) -> None:
    model.push_to_hub(repo_id)
    try:
        processor = AutoProcessor.from_pretrained(directory)
    except (OSError, ValueError, KeyError):
        return  # the model came without tokenizer or processor
    processor.push_to_hub(repo_id)


def _eval(args: argparse.Namespace) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    options = {name: value for name, value in _given(args, perplexity).items() if name != "data"}
    tokenizer = AutoTokenizer.from_pretrained(args.path)
    model = AutoModelForCausalLM.from_pretrained(args.path, dtype=args.dtype).to(device)
    started = time.perf_counter()
    value = perplexity(model, args.data, tokenizer, **options)
    seconds = time.perf_counter() - started
    if args.json:
        result = {"model": args.path, "data": args.data, **options, "perplexity": value, "seconds": seconds}
        print(json.dumps(result))
    else:
        print(f"perplexity {value:.4f} on {args.data} ({seconds:.1f} s)")


def _inspect(args: argparse.Namespace) -> None:
    inspection = inspect_checkpoint(args.path)
    print(json.dumps(asdict(inspection), indent=1) if args.json else inspection)


def _json(field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{field}={text!r}: expected a JSON object ({error})") from error


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown names, and devices that this machine lacks
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={device!r}: cannot be used here ({reason})") from error


@contextmanager
def _log_lines() -> Iterator[None]:
    """Shows what the package logs, a line a layer, on stderr."""
    logger = logging.getLogger("hf_sparselr")
    handler, level = logging.StreamHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
