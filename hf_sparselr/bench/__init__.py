"""`hf-sparselr bench ...`: the measurements behind the README, for anyone to rerun. One module a command."""

import argparse
import importlib
import sys
from typing import Any

COMMANDS = {
    "methods": "methods and refinements on one model: errors, perplexity, seconds, bytes",
    "quality": "many models and refinements against their dense selves, in and out of the calibration's domain",
    "families": "trains small models of several architectures for `quality`",
    "compress": "seconds and memory of compressing one block, by phase",
    "forms": "flat against hierarchical low-rank parts of single layers at equal bytes",
    "model-forms": "flat against hierarchical low-rank parts in a whole model at equal bytes",
    "kernels": "speed of compressed layers against dense ones",
    "experts": "speed of packed experts against the grouped product of dense ones",
    "host": "time that a call of a compressed layer takes the host",
    "lora": "time of a training step of LoRA over a compressed model",
    "generate": "speed and memory of a compressed model's text generation against the dense one's",
}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Adds every command."""
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK", parser_class=_CommandParser)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, module=f"{__name__}.{name.replace('-', '_')}")


class _CommandParser(argparse.ArgumentParser):
    """The parser of a command; its module (`add_arguments(parser)`, `run(args)`) is imported when it is called.

    The modules import torch and transformers, which other commands and `--help` must not wait for.
    """

    def __init__(self, *, module: str, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._module: str | None = module

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if self._module is not None:
            from .record import recorded

            module, self._module = importlib.import_module(self._module), None
            self.description = module.__doc__
            module.add_arguments(self)
            self.add_argument("--record", metavar="FILE", help="write what is printed into this Markdown page, too")
            self.set_defaults(run=lambda args: recorded(module.run, args, sys.argv[1:]))
        return super().parse_known_args(*args, **kwargs)
