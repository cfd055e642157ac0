"""Many layer names as a few patterns, for config.json: engines learn from it which layers are packed.

A pattern is a dotted name in which a component of digits may be a set: "model.layers.{0-2,5}.mlp.up_proj".
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

MOST_NAMES = 1_000_000  # that patterns may stand for: a model with more layers is a damaged file

_SET = re.compile(r"\{\d+(-\d+)?(,\d+(-\d+)?)*\}")


def compact_names(names: Iterable[str]) -> list[str]:
    """The patterns that stand for exactly these names, whatever their order."""
    numbers = defaultdict(set)
    for name in sorted(names):
        parts = name.split(".")
        digits = [part for part in parts if _is_number(part)]
        template = tuple(None if _is_number(part) else part for part in parts)
        numbers[template].add(tuple(map(int, digits)))
    return [_pattern(template, sets) for template, tuples in numbers.items() for sets in _products(frozenset(tuples))]


def expand_names(patterns: Iterable[str]) -> list[str]:
    """The names that patterns stand for, each once.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: a range runs backwards, or the patterns stand for more than a million names.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layer name {pattern!r}: expected a string")
        choices = [_choices(part) for part in pattern.split(".")]
        for combination in itertools.product(*choices):
            names[".".join(combination)] = None
            if len(names) > MOST_NAMES:
                raise ValueError(f"layer name {pattern!r} stands for more than {MOST_NAMES:,} layers")
    return list(names)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _products(tuples: frozenset[tuple[int, ...]]) -> Iterator[list[set[int]]]:
    """Products of sets that together hold exactly these tuples, all of one length."""
    if () in tuples:
        yield []
        return
    rests = defaultdict(set)
    for first, *rest in tuples:
        rests[first].add(tuple(rest))
    firsts = defaultdict(set)
    for first, rest in rests.items():
        firsts[frozenset(rest)].add(first)
    for rest, group in firsts.items():
        for sets in _products(rest):
            yield [group, *sets]


def _pattern(template: tuple[str | None, ...], sets: list[set[int]]) -> str:
    left = iter(sets)
    return ".".join(_write(next(left)) if part is None else part for part in template)


def _write(numbers: set[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return str(runs[0][0])
    return "{" + ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs) + "}"


def _choices(part: str) -> list[str]:
    if not _SET.fullmatch(part):
        return [part]
    choices = []
    for run in part[1:-1].split(","):
        low, _, high = run.partition("-")
        first, last = int(low), int(high or low)
        if not first <= last < first + MOST_NAMES:
            raise ValueError(f"layer name component {part!r}: expected ranges LOW-HIGH of at most {MOST_NAMES:,}")
        choices.extend(map(str, range(first, last + 1)))
    return choices
