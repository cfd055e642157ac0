"""`--record FILE`: a command writes its own results into a Markdown page."""

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, TextIO

import torch


def recorded(run: Callable[[Any], Any], args: Any, command: list[str]) -> Any:
    """Runs a benchmark and, with `args.record`, writes what it printed into that page.

    The section of the same command is replaced, else one is added at the end. A command that fails writes nothing.

    Args:
        command: the words after `hf-sparselr`.
    """
    if args.record is None:
        return run(args)
    with _copied(sys.stdout) as printed:
        result = run(args)
    words = [word for word in command if word != "--record" and word != args.record]
    page = Path(args.record)
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    page.write_text(with_section(text, f"hf-sparselr {shlex.join(words)}", printed.getvalue()), encoding="utf-8")
    return result


def with_section(page: str, command: str, printed: str) -> str:
    """A page with the section of a command, whose output is `printed`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    where = f"{date.today()}, {device}, torch {torch.__version__}"
    head = f"<!-- {command} -->\n```sh\n{command}\n```\n\n{where}\n\n"
    section = f"{head}```text\n{printed.rstrip()}\n```\n<!-- end -->\n"
    old = re.compile(rf"<!-- {re.escape(command)} -->\n.*?<!-- end -->\n", re.DOTALL)
    if old.search(page):
        return old.sub(lambda _: section, page)
    return f"{page.rstrip()}\n\n{section}" if page.strip() else section


@contextlib.contextmanager
def _copied(stream: TextIO) -> Iterator[io.StringIO]:
    """Inside, what is printed to a stream is kept as well."""
    kept = io.StringIO()

    class Both(io.TextIOBase):
        def write(self, text: str) -> int:
            kept.write(text)
            return stream.write(text)

        def flush(self) -> None:
            stream.flush()

    with contextlib.redirect_stdout(Both()):
        yield kept
