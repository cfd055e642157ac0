"""The tables of `bench quality`, and how its results stand to one another."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import compress
from statistics import fmean, geometric_mean, median
from typing import Any

DENSE, ROUNDED, PUBLISHED = "dense", "8 bits", "published"
REFINEMENTS = ("none", "tm", "distill", "tm+distill")
CLEAR = 0.9  # of the gap without refinement, which matching should stay below
MOST = 0.85  # of `published`, above which a share is named
LEAST = 0.1  # a smaller share, or one below zero, counts as this one, so that it does not decide a geometric mean alone

_SETTING = ("model", "calibration", "sparsity", "rank")
_ORDER = (DENSE, ROUNDED, PUBLISHED, *REFINEMENTS)
_MEASURES = {"gap": "gap", "kl": "KL"}
_COSTS = {"last word": ".3f", "seconds": ".0f"}

Row = dict[str, Any]
Runs = dict[int, Row]  # {seed: result}
Groups = dict[tuple, dict[str, Runs]]  # {setting: {refinement: runs}}
Shares = dict[tuple[str, str, str], float]  # {(model, pattern, text): share}


def markdown(rows: list[Row]) -> str:
    """Two tables, means over seeds, and a summary.

    The first has a row a model, calibration, pattern and text, and a column a refinement: gap / divergence from the
    dense model in nats / share of predictions with its most probable token. The second has share of the dense bytes /
    share of hidden words that are found / seconds. Calibration and rank have no column where all rows share them.

    Args:
        rows: results as `bench quality` stores them, in any order.
    """
    groups = _grouped(rows)
    dense = {setting[0]: refinements for setting, refinements in groups.items() if not setting[2]}
    packed = {setting: refinements for setting, refinements in groups.items() if setting[2]}
    columns = sorted({name for own in packed.values() for name in own}, key=_ORDER.index)
    varied = [len({setting[place] for setting in packed}) > 1 for place in range(len(_SETTING))]
    shown = [name in ("model", "sparsity") or differs for name, differs in zip(_SETTING, varied, strict=True)]
    head = list(compress(_SETTING, shown))
    texts = [[*head, "text", "dense", ROUNDED, *columns, "seeds"]]
    costs = [[*head, "dense", ROUNDED, *columns]]
    for setting, own in packed.items():
        whole = {**dense.get(setting[0], {}), **own}
        names = list(map(str, compress(setting, shown)))
        for text in _texts(own, next(iter(own))):
            cells = [_errors(whole.get(refine, {}), text) for refine in (ROUNDED, *columns)]
            texts.append([*names, text, _perplexity(whole, text), *cells, _counts(own)])
        costs.append([*names, *(_costs(whole.get(refine, {})) for refine in (DENSE, ROUNDED, *columns))])
    tables = [_table(texts), "gap in perplexity / KL / same top token", _table(costs), "bytes / last word / seconds"]
    return "\n\n".join([*tables, "\n".join(summary(rows))])


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _perplexity(refinements: dict[str, Runs], text: str) -> str:
    return f"{refinements[DENSE][0]['sets'][text]['perplexity']:.2f}" if DENSE in refinements else ""


def _errors(runs: Runs, text: str) -> str:
    values = [row["sets"][text] for row in runs.values() if text in row["sets"]]
    if not values:
        return ""
    gap, kl, agreement = (fmean(value[name] for value in values) for name in ("gap", "kl", "agreement"))
    return f"{gap:.2f} / {kl:.4f} / {agreement:.1%}"


def _costs(runs: Runs) -> str:
    rows = list(runs.values())
    if not rows:
        return ""
    cells = [f"{rows[0]['bytes']:.3f}"]
    cells += [f"{fmean(row[name] for row in rows):{form}}" for name, form in _COSTS.items() if name in rows[0]]
    return " / ".join(cells)


def _counts(refinements: dict[str, Runs]) -> str:
    """How many seeds there are: of all refinements, or the fewest and the most."""
    counts = sorted({len(runs) for runs in refinements.values()})
    return "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def summary(rows: list[Row]) -> Iterator[str]:
    """How refinements stand to `published` and to one another, over all models, patterns and texts."""
    groups = _grouped(rows)
    found = dict.fromkeys(refine for refinements in groups.values() for refine in refinements)
    for refine in found:
        for measure, title in _MEASURES.items():
            shares = _everywhere(groups, refine, PUBLISHED, measure)
            if shares and refine != PUBLISHED:
                worst = max(shares, key=shares.__getitem__)
                line = (
                    f"{refine}: {title} {_mean_share(shares.values()):.3f} of published (geometric mean of "
                    f"{len(shares)}), at most {shares[worst]:.3f} ({' '.join(worst)}).{_by_text(shares)}"
                )
                yield f"{line} {_above(shares, MOST)}" if refine != "none" else line
    for refine, other, limit in (("tm", "none", CLEAR), ("tm+distill", "tm", 1.0)):
        for measure, title in _MEASURES.items():
            shares = _everywhere(groups, refine, other, measure)
            if shares:
                mean = _mean_share(shares.values())
                line = f"{refine}: {title} {mean:.3f} of {other} (geometric mean of {len(shares)})."
                yield f"{line} {_above(shares, limit)}"
    for refine in found:
        ratios = [ratio for refinements in groups.values() for ratio in _time_ratios(refinements, refine)]
        if ratios and refine != "none":
            yield f"{refine}: {geometric_mean(ratios):.2f} x the seconds of none (geometric mean of {len(ratios)})."
    yield from _sizes(groups)
    ranges = [spread for refinements in groups.values() for spread in _spreads(refinements)]
    if ranges:
        yield f"Seeds: the KL of a cell varies by {median(ranges):.1%} of its mean (median of {len(ranges)} ranges)."
    devices = Counter(row["device"] for row in rows)
    yield f"Results by device: {', '.join(f'{name} {count}' for name, count in sorted(devices.items()))}."


def _above(shares: Shares, limit: float) -> str:
    above = [f"{' '.join(place)} {share:.2f}" for place, share in shares.items() if share > limit]
    return f"Above {limit:g}: {', '.join(above) or 'none'}."


def _by_text(shares: Shares) -> str:
    """The same mean for each evaluation text, if there are several."""
    texts = sorted({text for _, _, text in shares})
    means = [f"{text} {_mean_share(share for (*_, of), share in shares.items() if of == text):.3f}" for text in texts]
    return f" By text: {', '.join(means)}." if len(texts) > 1 else ""


def _sizes(groups: Groups) -> Iterator[str]:
    """Bytes and losses of 8 bits and of the strongest refinement, by pattern: medians over models and texts."""
    refinements = {refine for own in groups.values() for refine in own}
    strongest = max(refinements - {DENSE, ROUNDED}, key=_ORDER.index, default=None)
    for pattern in sorted({setting[2] for setting in groups}):
        refine = strongest if pattern else ROUNDED
        runs = [own[refine].values() for setting, own in groups.items() if setting[2] == pattern and refine in own]
        rows = [row for each in runs for row in each]
        if rows:
            sizes = sorted({f"{row['bytes']:.2f}" for row in rows})
            lost = [[value[name] for row in rows for value in row["sets"].values()] for name in ("kl", "gap")]
            yield (
                f"{f'{pattern} {refine}'.strip()}: {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} of the bytes, "
                f"KL {median(lost[0]):.4f}, gap {median(lost[1]):.2f} (medians)."
            )


def _spreads(refinements: dict[str, Runs]) -> Iterator[float]:
    """The ranges of the divergences over seeds, as shares of their means."""
    for refine, runs in refinements.items():
        for text in _texts(refinements, refine):
            values = [row["sets"][text]["kl"] for row in runs.values()]
            if len(values) > 1 and min(values) > 0:
                yield (max(values) - min(values)) / fmean(values)


def _grouped(rows: list[Row]) -> Groups:
    """In an order of their own: rows of several processes come in any order."""
    ordered = sorted(rows, key=lambda row: [*map(str, map(row.get, _SETTING)), _ORDER.index(row["refine"])])
    groups: Groups = {}
    for row in ordered:
        setting = tuple(row[name] for name in _SETTING)
        groups.setdefault(setting, {}).setdefault(row["refine"], {})[row["seed"]] = row
    return groups


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


def _everywhere(groups: Groups, refine: str, other: str, measure: str) -> Shares:
    return {
        (setting[0], setting[2], name): share
        for setting, refinements in groups.items()
        for name, share in _shares(refinements, refine, other, measure).items()
    }


def _time_ratios(refinements: dict[str, Runs], refine: str) -> Iterator[float]:
    """Seconds as a multiple of those of no refinement, on each device that has both."""
    devices = {row["device"] for row in refinements.get(refine, {}).values() if "seconds" in row}
    for device in sorted(devices):
        own = {
            name: {seed: row for seed, row in runs.items() if row["device"] == device}
            for name, runs in refinements.items()
        }
        for mine, theirs in _pairs(own, refine, "none", lambda row: row["seconds"]):
            yield mine / theirs


def _mean_share(shares: Any) -> float:
    return geometric_mean([max(share, LEAST) for share in shares])
