"""Kinds of values: what a field of the config may hold, and how the command line reads it.

Nothing here imports torch or transformers, so that the command line can check arguments at once.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..utils.validation import (
    anchored,
    check_choice,
    check_integer,
    check_number,
    check_numbers,
    reject_unknown,
)

OVERRIDE_KEYS = ("sparsity", "rank", "skip")


@dataclass(frozen=True)
class Kind:
    """Anything."""

    @property
    def option(self) -> Mapping[str, Any]:
        """Keywords of `argparse.add_argument` for a field of this kind."""
        return {"metavar": "TEXT"}

    def check(self, field: str, value: Any) -> Any:
        """The value as the config keeps it.

        Raises:
            TypeError, ValueError: naming the field, the value and what is allowed.
        """
        return value

    def from_option(self, field: str, value: Any) -> Any:
        """The value that an argument of the command line stands for."""
        return value


@dataclass(frozen=True)
class Choice(Kind):
    """One of some strings, or None ("none" on the command line, which does not offer those in `hidden`)."""

    allowed: tuple[str | None, ...]
    hidden: tuple[str, ...] = ()

    @property
    def option(self) -> Mapping[str, Any]:
        offered = [value for value in self.allowed if value not in self.hidden]
        return {"choices": tuple("none" if value is None else value for value in offered)}

    def check(self, field: str, value: Any) -> Any:
        check_choice(field, value, self.allowed)
        return value

    def from_option(self, field: str, value: str) -> str | None:
        return None if value == "none" else value


@dataclass(frozen=True)
class Integer(Kind):
    """An integer of at least `least` and at most `most`; with `optional`, or None."""

    least: int
    most: int | None = None
    optional: bool = False

    @property
    def option(self) -> Mapping[str, Any]:
        return {"type": int, "metavar": "N"}

    def check(self, field: str, value: Any) -> Any:
        if value is not None or not self.optional:
            check_integer(field, value, self.least, self.most)
        return value


@dataclass(frozen=True)
class Share(Kind):
    """None, or a number between 0 and 1, these two included unless `exclusive`."""

    exclusive: bool = False

    @property
    def option(self) -> Mapping[str, Any]:
        return {"type": float, "metavar": "SHARE"}

    def check(self, field: str, value: Any) -> Any:
        if value is not None:
            check_number(field, value, 0, 1, exclusive=self.exclusive)
        return value


@dataclass(frozen=True)
class Numbers(Kind):
    """`length` finite numbers >= 0."""

    length: int

    @property
    def option(self) -> Mapping[str, Any]:
        return {"type": float, "nargs": self.length, "metavar": "X"}

    def check(self, field: str, value: Any) -> tuple[float, ...]:
        return check_numbers(field, value, self.length, 0.0)


@dataclass(frozen=True)
class Sparsity(Kind):
    """None, "n:m", or a fraction of zeros."""

    @property
    def option(self) -> Mapping[str, Any]:
        return {"metavar": "S"}

    def check(self, field: str, value: Any) -> Any:
        from ..format.patterns import parse

        if value is not None:
            parse(value, field)
        return value

    def from_option(self, field: str, value: str) -> str | float | None:
        from ..format.patterns import from_text

        return None if value == "none" else from_text(value)


@dataclass(frozen=True)
class Regexes(Kind):
    """None, a regular expression over module names, or a list of them."""

    @property
    def option(self) -> Mapping[str, Any]:
        return {"nargs": "+", "metavar": "RE"}

    def check(self, field: str, value: Any) -> list[str] | None:
        if value is None:
            return None
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, (list, tuple)) or not patterns:
            raise TypeError(f"{field}={value!r}: expected a list of regular expressions over module names, or None")
        for pattern in patterns:
            _check_regex(field, pattern)
        return list(patterns)


@dataclass(frozen=True)
class Options(Kind):
    """A group of options: a dict, a dataclass or None. The config builds and checks it."""

    @property
    def option(self) -> Mapping[str, Any]:
        return {"metavar": "JSON"}

    def from_option(self, field: str, value: str) -> Any:
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{field}={value!r}: expected a JSON object ({error})") from error


@dataclass(frozen=True)
class Overrides(Options):
    """{regex: {"sparsity": ..., "rank": ..., "skip": ...}}; whether the method can do that, the config checks."""

    def check(self, field: str, value: Any) -> dict[str, dict]:
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise TypeError(f"{field}={value!r}: expected {{regex: {{sparsity, rank, skip}}}}")
        for pattern, override in value.items():
            _check_regex(field, pattern)
            _check_override(f"{field}[{pattern!r}]", override)
        return value


@dataclass(frozen=True)
class Calibration(Kind):
    """A source of calibration data."""

    @property
    def option(self) -> Mapping[str, Any]:
        return {"metavar": "SRC"}

    def check(self, field: str, value: Any) -> Any:
        from ..data.calibration import CUSTOM, check_source

        if not (isinstance(value, str) and value == CUSTOM):
            check_source(value)
        return value


@dataclass(frozen=True)
class Kernel(Kind):
    """A way of computing packed layers."""

    def check(self, field: str, value: Any) -> Any:
        from ..kernels import KERNELS

        check_choice(field, value, KERNELS)
        return value


@dataclass(frozen=True)
class Reader(Kind):
    """A tokenizer or processor."""

    def check(self, field: str, value: Any) -> Any:
        if isinstance(value, str | os.PathLike):
            raise TypeError(
                f"{field}={value!r}: expected a tokenizer or processor, as AutoTokenizer.from_pretrained returns one, "
                "or None"
            )
        return value


def _check_regex(field: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{field}={pattern!r}: expected a regular expression over module names")
    try:
        re.compile(pattern)
        re.compile(anchored(pattern))  # refuses global flags such as (?i)
    except re.error as error:
        raise ValueError(f"{field}={pattern!r}: not a regular expression ({error})") from error


def _check_override(field: str, override: Any) -> None:
    if not isinstance(override, dict) or not override:
        raise TypeError(f"{field}={override!r}: expected a dict with some of {', '.join(OVERRIDE_KEYS)}")
    reject_unknown(field, list(override), list(OVERRIDE_KEYS))
    if not isinstance(override.get("skip", False), bool):
        raise TypeError(f"{field}['skip']={override['skip']!r}: expected True or False")
    if override.get("skip") and len(override) > 1:
        raise ValueError(f"{field}={override!r}: skip=True contradicts sparsity and rank")
    if override.get("sparsity", 0) is None:
        raise TypeError(f"{field}['sparsity']=None: leave it out to keep the sparsity of the other layers")
    if "sparsity" in override:
        Sparsity().check(f"{field}['sparsity']", override["sparsity"])
    if "rank" in override:
        Integer(0).check(f"{field}['rank']", override["rank"])
