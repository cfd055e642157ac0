"""`hf-sparselr bench ...`: the measurements behind the README, for anyone to rerun. One module a command."""

import argparse
import importlib

COMMANDS = {
    "methods": "methods and refinements on one model: errors, perplexity, seconds, bytes",
    "compress": "seconds and memory of compressing one block, by phase",
    "kernels": "speed of compressed layers against dense ones",
    "generate": "speed and memory of a compressed model's text generation against the dense one's",
}


def add_parsers(parser: argparse.ArgumentParser) -> None:
    """Adds every command; its module has `add_arguments(parser)` and `run(args)`."""
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
