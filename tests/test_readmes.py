"""Commands and links in the READMEs: the command line takes the ones, the others lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from helpers.paths import ROOT

from hf_sparselr.cli import _parser

FILES = [
    path
    for folder in ("hf_sparselr", "examples", ".github", "model_cards")
    for path in sorted((ROOT / folder).rglob("*.md"))
]
FILES.append(ROOT / "README.md")


def commands(path: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("hf-sparselr ")]


COMMANDS = [pytest.param(line, id=f"{path.parent.name}: {line}") for path in FILES for line in commands(path)]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_one_of_the_command_line(line: str) -> None:
    assert callable(_parser().parse_args(shlex.split(line, comments=True)[1:]).run)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).resolve().exists()]
    assert not missing
