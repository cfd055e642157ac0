"""Checks of user input: every error names the field, the value and what is allowed."""

import difflib
import math
import re
from dataclasses import fields
from typing import Any

MOST = 10**6  # of numbers without a bound of their own: far above any sensible one, far below overflow


def check_integer(field: str, value: Any, least: int, most: int | None = None) -> None:
    """An integer from `least` to `most`, else to `MOST`."""
    allowed = f"an integer >= {least}" if most is None else f"an integer in {least}..{most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}={value!r}: expected {allowed}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{field}={_short(value)}: expected {allowed}")
    if most is None and value > MOST:
        raise ValueError(f"{field}={_short(value)}: expected an integer <= {MOST}")


def check_number(field: str, value: Any, least: float, most: float | None = None, *, exclusive: bool = False) -> None:
    """A number from `least` to `most`, else to `MOST`; with `exclusive`, these two are not allowed."""
    opening, closing = "()" if exclusive else "[]"
    allowed = f"a number in {opening}{least:g}, {most:g}{closing}" if most is not None else ""
    allowed = allowed or f"a finite number {'>' if exclusive else '>='} {least:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field}={value!r}: expected {allowed}")
    limit = math.inf if most is None else most
    inside = least < value < limit if exclusive else least <= value <= limit
    if not inside or value == math.inf:
        raise ValueError(f"{field}={_short(value)}: expected {allowed}")
    if most is None and value > MOST:
        raise ValueError(f"{field}={_short(value)}: expected a number <= {MOST}")


def check_numbers(field: str, value: Any, length: int, least: float, most: float | None = None) -> tuple[float, ...]:
    """A tuple of `length` numbers, each as `check_number` wants it."""
    if not isinstance(value, (tuple, list)) or len(value) != length:
        raise TypeError(f"{field}={value!r}: expected {length} numbers >= {least:g}")
    for item in value:
        check_number(field, item, least, most)
    return tuple(value)


def _short(value: float) -> str:
    """A number as text: huge integers as a power of ten."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"about 10**{int(value.bit_length() * math.log10(2))}"
    return repr(value)


def check_choice(field: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r}: expected one of {', '.join(map(repr, allowed))}")


def reject_unknown(what: str, names: list[str], known: list[str]) -> None:
    for name in set(names) - set(known):
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{what} has no field {name!r}{hint} (it has {', '.join(known)})")


def build_options(field: str, value: Any, cls: type, preset: dict[str, Any] | None = None) -> Any:
    """An options dataclass out of itself, a dict, or None; `preset` beats the defaults, the dict beats both."""
    if value is None:
        return cls(**(preset or {}))
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"{field}={value!r}: expected a dict or {cls.__module__}.{cls.__qualname__}")
    reject_unknown(field, list(value), [option.name for option in fields(cls)])
    return cls(**{**(preset or {}), **value})


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a dotted module name or the end of it, as PEFT's patterns do."""
    return re.fullmatch(anchored(pattern), name) is not None


def covers(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a dotted module name or one of the modules above it."""
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:end])) for end in range(len(parts), 0, -1))


def anchored(pattern: str) -> str:
    return rf"(?:.*\.)?(?:{pattern})"
