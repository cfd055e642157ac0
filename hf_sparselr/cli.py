"""The command `hf-sparselr`: compress a model, measure perplexity, look into a checkpoint, run benchmarks.

torch and transformers are imported by the commands, after their arguments were parsed and checked.
"""

import argparse
import dataclasses
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import __version__, bench
from .config.fields import FIELDS
from .data.sources import FILES, load_texts
from .utils.validation import check_integer

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_STREAM = {"auto": "auto", "yes": True, "no": False}
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0, or 2 after an error, told in one line on stderr, or 130 after Ctrl-C. Arguments that cannot
        be parsed exit with 2 as argparse does it.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError) as error:
        who = f"process {_process()} of {_processes()}: " if _processes() > 1 else ""
        print(f"hf-sparselr: error: {who}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"hf-sparselr: stopped. {interrupt}", file=sys.stderr)
        return 130
    return 0


def _processes() -> int:
    """How many processes a launcher (torchrun, accelerate launch) started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _process() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-sparselr", description="Sparse plus low-rank compression of transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf-sparselr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compress(commands.add_parser("compress", help="compress a model and write the packed checkpoint"))
    _add_eval(commands.add_parser("eval", help="perplexity of a model, compressed or not"))
    _add_inspect(commands.add_parser("inspect", help="layers, patterns, ranks and bytes of a compressed checkpoint"))
    bench.add_commands(commands.add_parser("bench", help="measure methods, compression speed, kernels, generation"))
    return parser


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_compress)
    parser.add_argument("name", help="a Hub id or a directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write the checkpoint")
    for name, field in FIELDS.items():
        if field.on_command_line:
            default = "" if field.default is None else f" (default: {_shown(field.default)})"
            text = f"{field.help}{default}".replace("%", "%%")
            parser.add_argument(_flag(name), default=argparse.SUPPRESS, help=text, **field.kind.option)
    _add_loading(parser)
    parser.add_argument(
        "--stream",
        choices=tuple(_STREAM),
        default="auto",
        help="read and write one block at a time, so that the model need not fit into memory; auto: if it would take "
        "more than half of the free memory (default: auto)",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", default="50GB", help="of weight files (default: 50GB)")
    overwriting = "replace a checkpoint, or an unfinished run with other arguments, in DIR"
    parser.add_argument("--overwrite", action="store_true", help=overwriting)
    parser.add_argument("--push", metavar="REPO_ID", help="also push to this Hub repository")


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """Arguments of `from_pretrained`."""
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights (default: auto)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code beside the model")


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `from_pretrained` that were given, except dtype."""
    given = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    return {name: value for name, value in given.items() if value}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_eval)
    parser.add_argument("path", help="a directory or a Hub id")
    parser.add_argument(
        "--data",
        metavar="SRC",
        default=WIKITEXT,
        help=f'"file:GLOB" or a Hub data set "id[:config]", of which the test split is read (default: {WIKITEXT})',
    )
    integer: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--seq-len",
        default=2048,
        help="tokens in a window, bounded by the model's context (default: 2048)",
        **integer,
    )
    parser.add_argument(
        "--stride",
        help="tokens from the start of a window to the next; without it, windows do not overlap",
        **integer,
    )
    parser.add_argument("--batch-size", default=8, help="windows at a time (default: 8)", **integer)
    parser.add_argument("--device", metavar="D", help="default: CUDA if present, else the CPU")
    _add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_inspect)
    parser.add_argument("path", help="a directory or a Hub id")
    parser.add_argument("--verify", action="store_true", help="read all tensors and compare their checksums")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _compress(args: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    fields = {name: FIELDS[name].kind.from_option(name, value) for name, value in given.items()}
    for name, value in fields.items():
        FIELDS[name].kind.check(name, value)
    _check_model(args.name, args.revision)
    if args.push:
        from .integrations.hub.rights import check_push_rights

        check_push_rights(args.push)

    from .config.sparselr_config import SparseLRConfig

    config = SparseLRConfig(**fields)

    from .entrypoints.compress import compress

    with _log_lines():
        writing = {"overwrite": args.overwrite, "max_shard_size": args.max_shard_size}
        loading = {"dtype": args.dtype, **_loading(args)}
        running = {"distributed": _processes() > 1, "stream": _STREAM[args.stream]}
        model = compress(args.name, config, args.output, **running, **writing, **loading)
    if _process() > 0:
        return
    report = model.sparselr_report
    print(report)
    dense, packed = report.sizes["dense"], report.sizes["packed"]
    print(f"{dense:,} bytes dense, {packed:,} packed ({packed / dense:.2%}), {report.seconds:.1f} s")
    print(f"written to {args.output}")
    if args.push:
        _push(model, args.output, args.push)
        print(f"pushed to {args.push}")


def _push(model: Any, directory: str, repo_id: str) -> None:
    from transformers import AutoProcessor

    model.push_to_hub(repo_id)
    try:
        processor = AutoProcessor.from_pretrained(directory)
    except (OSError, ValueError, KeyError):
        return  # the model came without tokenizer or processor
    processor.push_to_hub(repo_id)


def _eval(args: argparse.Namespace) -> None:
    _check_model(args.path, args.revision)
    for name, least in (("seq_len", 2), ("batch_size", 1), ("stride", 1)):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), least)
    local = args.data.startswith(FILES)
    texts = load_texts(args.data, field="data") if local else []

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .entrypoints.perplexity import perplexity
    from .utils.modules import check_device

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    texts = texts if local else load_texts(args.data, "test", "data")
    options = {"seq_len": args.seq_len, "stride": args.stride, "batch_size": args.batch_size}
    tokenizer = AutoTokenizer.from_pretrained(args.path, **_loading(args))
    model = AutoModelForCausalLM.from_pretrained(args.path, dtype=args.dtype, **_loading(args)).to(device)
    started = time.perf_counter()
    value = perplexity(model, texts, tokenizer, **options)
    seconds = time.perf_counter() - started
    if args.json:
        result = {"model": args.path, "data": args.data, **options, "perplexity": value, "seconds": seconds}
        print(json.dumps(result))
    else:
        print(f"perplexity {value:.4f} on {args.data} ({seconds:.1f} s)")


def _inspect(args: argparse.Namespace) -> None:
    _check_model(args.path)

    from .entrypoints.inspect import inspect_checkpoint

    inspection = inspect_checkpoint(args.path, args.verify)
    print(json.dumps(dataclasses.asdict(inspection), indent=1) if args.json else inspection)


def _check_model(name: str, revision: str | None = None) -> None:
    """Checks that a folder or a model on the Hub exists, before anything large is imported.

    Raises:
        OSError: neither.
    """
    if os.path.isdir(name):
        return
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f'{name!r} is no folder, and no Hub id either ("name" or "user/name")')

    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json", revision=revision)
    except OSError as error:
        raise OSError(f"{name!r} is no folder, and its config.json cannot be read from the Hub: {error}") from error


@contextmanager
def _log_lines() -> Iterator[None]:
    """Shows the package's log, a line a layer, on stderr."""
    logger = logging.getLogger("hf_sparselr")
    handler, level = logging.StreamHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
