"""The reference page: every field and option, written into this room's README.

python -m hf_sparselr.config.reference
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..solvers.registry import METHODS, PRECOMPUTED
from .fields import FIELDS
from .hierarchy import HierarchyOptions
from .options import ALLOCATION_OPTIONS, DistillOptions, TMOptions
from .presets import PRESETS

README = Path(__file__).parent / "README.md"

_START, _END = "<!-- reference -->", "<!-- end of reference -->"
_PRESET_FIRST = "What [`effort`](#effort) sets comes before these defaults, and what you give before both."
_ENTRY = re.compile(r"^    (\w[\w, ]*): ")


def reference() -> str:
    """The tables of all fields and options, in Markdown."""
    return "\n\n".join("\n".join(part) for part in _parts())


def written(page: str) -> str:
    """A page with the reference between its two marks."""
    head, _, rest = page.partition(_START)
    _, _, tail = rest.partition(_END)
    return f"{head}{_START}\n\n{reference()}\n\n{_END}{tail}"


def _parts() -> Iterator[list[str]]:
    yield ["### SparseLRConfig"]
    yield _fields()
    groups = {
        "`tm`: transformer matching": TMOptions,
        "`distill`: distillation": DistillOptions,
        '`hierarchy` with `low_rank="hss"`': HierarchyOptions,
    }
    for name, cls in ALLOCATION_OPTIONS.items():
        groups[f'`allocation_options` with `allocation="{name}"`'] = cls
    for name, method in METHODS.items():
        if name != PRECOMPUTED:
            groups[f'`method_options` with `method="{name}"`'] = method.options
    for title, cls in groups.items():
        if dataclasses.fields(cls):
            yield [f"### {title}"]
            if cls in (TMOptions, DistillOptions):
                yield [_PRESET_FIRST]
            yield _options(cls)
    yield ["### `effort`"]
    yield _presets()


def _fields() -> list[str]:
    rows = [
        (f"`{field.name}`", f"`{field.type}`", _code(field.default), _sentence(field.help, field.stored))
        for field in FIELDS.values()
    ]
    return _table(("field", "type", "default", "meaning"), rows)


def _sentence(text: str, stored: bool) -> str:
    return text + ("." if stored else ". Not stored in config.json.")


def _options(cls: type) -> list[str]:
    texts = attributes(cls)
    rows = [
        (f"`{option.name}`", _code(option.default), texts.get(option.name, "")) for option in dataclasses.fields(cls)
    ]
    return _table(("option", "default", "meaning"), rows)


def _presets() -> list[str]:
    groups = {"3basil": 'method_options of "3basil"', "tm": "tm", "distill": "distill"}
    rows = [
        (f'"{effort}"', *(_settings(preset.get(group, {})) for group in groups)) for effort, preset in PRESETS.items()
    ]
    return _table(("effort", *groups.values()), rows)


def _settings(values: dict) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in values.items())


def attributes(cls: type) -> dict[str, str]:
    """The "Attributes:" of the docstrings of a class and its bases: {name: text}."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= _attributes(inspect.cleandoc(base.__doc__ or ""))
    return texts


def _attributes(docstring: str) -> dict[str, str]:
    """Of one docstring; an entry may name several attributes."""
    _, _, section = docstring.partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        if match := _ENTRY.match(line):
            names = match[1].split(", ")
            line = line[match.end() :]
        for name in names:
            texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return texts


def _code(value: object) -> str:
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return f"`{text}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
