"""The outcomes as a Markdown page: a table by class, and the failures by root kind."""

import re
from collections import defaultdict
from pathlib import Path

import transformers as tf

OUTCOMES = ("passes", "refused", "accident", "no tiny model")
MARKS = ("<!-- outcomes -->", "<!-- end of outcomes -->")


def write_table(path: Path, outcomes: dict[str, dict[str, dict]], totals: dict[str, int]) -> None:
    """Writes the outcomes between the marks of a page.

    Args:
        outcomes: {task class: {model type: outcome}}.
        totals: {task class: number of its types in transformers}.
    """
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    text = "\n\n".join((by_class(outcomes, totals), by_kind(outcomes)))
    path.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def by_class(outcomes: dict[str, dict[str, dict]], totals: dict[str, int]) -> str:
    lines = [
        f"transformers {tf.__version__}. `built`: types of which a tiny model could be built and run dense.",
        "",
        "| class | types | tried | built | pass | refused | accident | of those that pass, under 60% packed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, total in totals.items():
        rows = list(outcomes.get(task, {}).values())
        count = {name: sum(row["outcome"] == name for row in rows) for name in OUTCOMES}
        low = sum(row["outcome"] == "passes" and (row.get("share") or 0) < 0.6 for row in rows)
        built = len(rows) - count["no tiny model"]
        cells = (task, total, len(rows), built, *(_part(count[name], built) for name in OUTCOMES[:3]), low)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def by_kind(outcomes: dict[str, dict[str, dict]]) -> str:
    """Accidents and refusals, those with the most types first."""
    sections = []
    for outcome, title in (
        ("accident", "Accidents"),
        ("refused", "Refusals"),
        ("no tiny model", "No tiny model"),
    ):
        kinds = defaultdict(list)
        for types in outcomes.values():
            for name, row in types.items():
                if row["outcome"] == outcome:
                    kinds[row["step"], general(row["error"])].append((name, row))
        lines = [
            f"### {title}",
            "",
            "| types | step | first line of the error | for example |",
            "|---|---|---|---|",
        ]
        for (step, error), rows in sorted(kinds.items(), key=lambda item: -len(item[1])):
            names = sorted({name for name, _ in rows})
            shown = ", ".join(names[:6]) + ", ..." * (len(names) > 6)
            lines.append(f"| {len(rows)} | {step} | {_cell(error)} | {shown} |")
        if kinds:
            sections.append("\n".join(lines))
    return "\n\n".join(sections)


def general(error: str) -> str:
    """The first line of an error without the names and numbers of one model."""
    error = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "'...'", error)
    error = re.sub(r"\b[A-Z]\w*(?:Model|Config|For\w+|Attention|Block|Layer|Encoder|Decoder)\b", "<Class>", error)
    error = re.sub(r"\b\w+(?:\.\w+)+\b", "<name>", error)
    return re.sub(r"\d+", "N", error)[:160]


def _part(count: int, built: int) -> str:
    return f"{count} ({count / built:.0%})" if built else str(count)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
