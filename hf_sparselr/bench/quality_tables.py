"""The tables of `bench quality`, and how its results stand to one another."""

from collections.abc import Callable, Iterator
from statistics import fmean, geometric_mean
from typing import Any

DENSE, ROUNDED, PUBLISHED = "dense", "8 bits", "published"
CLEAR = 0.9  # of the gap without refinement, which matching should stay below
LEAST = 0.01  # a smaller share counts as this one, so that one of zero does not decide a geometric mean alone

_SETTING = ("model", "calibration", "sparsity", "rank")
_MEASURES = {"gap": "gap", "kl": "KL"}

Row = dict[str, Any]
Runs = dict[int, Row]  # {seed: result}
Groups = dict[tuple, dict[str, Runs]]  # {setting: {refinement: runs}}


def markdown(rows: list[Row]) -> str:
    """A row a model, calibration, pattern and refinement, means over seeds; then a summary.

    Args:
        rows: results as `bench quality` stores them, in any order.
    """
    groups = _grouped(rows)
    names = sorted({name for row in rows for name in row["sets"]})
    header = ["model", "calibration", "sparsity", "refine", "seeds", "bytes", "seconds"]
    for name in names:
        header += [f"{name}: gap", "KL", "same top token"]
    header += ["last word", "gaps / published", "KLs / published"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for setting, refinements in groups.items():
        for refine, runs in refinements.items():
            cells = [*map(str, setting[:3]), refine, *_measured(runs, names, refine)]
            for measure in _MEASURES:
                shares = list(_shares(refinements, refine, PUBLISHED, measure).values())
                cells.append(f"{_mean_share(shares):.2f}" if shares else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *summary(rows)])


def summary(rows: list[Row]) -> Iterator[str]:
    """How refinements stand to `published` and to one another, over all models, patterns and texts."""
    groups = _grouped(rows)
    found = dict.fromkeys(refine for refinements in groups.values() for refine in refinements)
    for refine in found:
        for measure, title in _MEASURES.items():
            shares = _everywhere(groups, refine, PUBLISHED, measure)
            if shares and refine != PUBLISHED:
                worst = max(shares, key=shares.__getitem__)
                yield (
                    f"{refine}: {title} {_mean_share(shares.values()):.3f} of published (geometric mean of "
                    f"{len(shares)}), at most {shares[worst]:.3f} ({worst})."
                )
    for refine, other, limit in (("tm", "none", CLEAR), ("tm+distill", "tm", 1.0)):
        for measure, title in _MEASURES.items():
            shares = _everywhere(groups, refine, other, measure)
            if shares:
                above = [f"{name} {share:.2f}" for name, share in shares.items() if share > limit]
                yield (
                    f"{title} of {refine} above {limit:g} x {other}: {len(above)} of {len(shares)}. {', '.join(above)}"
                )
    for refine in found:
        ratios = [ratio for refinements in groups.values() for ratio in _time_ratios(refinements, refine)]
        if ratios and refine != "none":
            yield f"{refine}: {geometric_mean(ratios):.2f} x the seconds of none (geometric mean of {len(ratios)})."


def _grouped(rows: list[Row]) -> Groups:
    """In an order of their own: rows of several processes come in any order."""
    refinements = list(dict.fromkeys((DENSE, ROUNDED, PUBLISHED, "none", *(row["refine"] for row in rows))))
    ordered = sorted(rows, key=lambda row: [*map(str, map(row.get, _SETTING)), refinements.index(row["refine"])])
    groups: Groups = {}
    for row in ordered:
        setting = tuple(row[name] for name in _SETTING)
        groups.setdefault(setting, {}).setdefault(row["refine"], {})[row["seed"]] = row
    return groups


def _measured(runs: Runs, names: list[str], refine: str) -> Iterator[str]:
    rows = list(runs.values())
    yield str(len(rows))
    yield f"{rows[0]['bytes']:.3f}"
    yield f"{fmean(row['seconds'] for row in rows):.0f}" if "seconds" in rows[0] else ""
    for name in names:
        values = [row["sets"][name] for row in rows if name in row["sets"]]
        if not values:
            yield from ("", "", "")
        elif refine == DENSE:
            yield from (f"{values[0]['perplexity']:.2f} (dense)", "", "")
        else:
            yield _seeds([value["gap"] for value in values])
            yield f"{fmean(value['kl'] for value in values):.4f}"
            yield f"{fmean(value['agreement'] for value in values):.3f}"
    yield f"{fmean(row['last word'] for row in rows):.3f}" if "last word" in rows[0] else ""


def _seeds(values: list[float]) -> str:
    """The mean, and the extremes of several seeds."""
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{spread}"


def _shares(refinements: dict[str, Runs], refine: str, other: str, measure: str) -> dict[str, float]:
    """{evaluation text: a measure as a share of that of another refinement}, of means over the seeds that both have.

    A text is left out where the other's is not above zero: there is nothing to take a share of.
    """
    return {
        name: max(mine, 0.0) / theirs
        for name in _texts(refinements, refine)
        for mine, theirs in _pairs(refinements, refine, other, lambda row, name=name: row["sets"][name][measure])
        if theirs > 0
    }


def _texts(refinements: dict[str, Runs], refine: str) -> list[str]:
    return list(next(iter(refinements[refine].values()))["sets"]) if refine in refinements else []


def _pairs(
    refinements: dict[str, Runs], refine: str, other: str, value: Callable[[Row], float]
) -> Iterator[tuple[float, float]]:
    """The means of a value of two refinements over the seeds that both have; nothing where they share none."""
    mine, theirs = (refinements.get(name, {}) for name in (refine, other))
    common = [seed for seed in mine if seed in theirs]
    if common:
        yield fmean(value(mine[seed]) for seed in common), fmean(value(theirs[seed]) for seed in common)


def _everywhere(groups: Groups, refine: str, other: str, measure: str) -> dict[str, float]:
    """{model, pattern and text: share}."""
    return {
        f"{setting[0]} {setting[2]} {name}": share
        for setting, refinements in groups.items()
        for name, share in _shares(refinements, refine, other, measure).items()
    }


def _time_ratios(refinements: dict[str, Runs], refine: str) -> Iterator[float]:
    if all("seconds" in row for name in (refine, "none") for row in refinements.get(name, {}).values()):
        for mine, theirs in _pairs(refinements, refine, "none", lambda row: row["seconds"]):
            yield mine / theirs


def _mean_share(shares: Any) -> float:
    return geometric_mean([max(share, LEAST) for share in shares])
