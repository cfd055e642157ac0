"""The report of a compression run: one row a layer, one row a block, printed and saved as JSON."""

import contextlib
import json
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..format.staging import write_text
from ..utils.public_names import hub_id, public_source

FILE_NAME = "sparselr_report.json"
FEW_TOKENS = 0.1  # of an even share, below which an expert is named

logger = logging.getLogger("hf_sparselr")

_PHASES = ("capture and Gram", "solve", "TM", "propagation")  # of a block

# Types of the fields in a report file; a field with a value of another type is left out.
_TYPES = {
    "settings": dict,
    "layers": list,
    "blocks": list,
    "allocation": dict,
    "coverage": dict,
    "dense": dict,
    "distill": (dict, type(None)),
    "sizes": dict,
    "base_model": (str, type(None)),
    "perplexity": dict,
    "seconds": (int, float),
    "peak_memory": (int, type(None)),
}


@dataclass
class Report:
    """The result of a run; `model.sparselr_report`.

    Attributes:
        settings: the config as stored in config.json.
        layers: a dict a layer: name, shape, pattern, rank, sparsity (share of zeros), relative_error
            (tr(E H E^T) / tr(W H W^T) on the calibration inputs, before refinement), iterations, seconds, ...; of
            an expert's layer tokens (that its router sent there) and share (of all tokens of the stack).
        dense: {planned layer that stayed dense: why}.
        coverage: {"packed": weights in packed layers, "total": weights of all linear layers and experts in the blocks,
            "dense": {name of a layer or parameter that stayed dense: its weights}}.
        allocation: measurements and choices of a non-uniform allocation, {} for a uniform one.
        distill: what `distill` returned: losses, kept_back, best_pass, loss_before, loss_after, ...; and self_written,
            how the text that the dense model wrote begins (`Samples.for_distillation`). None without distillation.
        blocks: a dict a block: name, tm (what `match_block` returned: loss_before, loss_after, train_loss,
            kept_back_loss, ...; None without refinement), seconds, phases ({phase: seconds}), peaks ({phase: bytes on
            the GPU}).
        sizes: bytes of the model dense and packed, {"dense": ..., "packed": ...}.
        base_model: the dense model's name, as it was given.
        base_on_hub: it was loaded from the Hub. Only then it is written to files.
        from_file: the report was read from a checkpoint: its text is shown, and nothing is looked up for it.
        perplexity: measured perplexities, {"dense": ..., "compressed": ...}, or {}.
        seconds: the whole run.
        peak_memory: bytes on the GPU, None on the CPU.
    """

    settings: dict
    layers: list[dict] = field(default_factory=list)
    blocks: list[dict] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    coverage: dict = field(default_factory=dict)
    allocation: dict = field(default_factory=dict)
    distill: dict | None = None
    sizes: dict = field(default_factory=dict)
    base_model: str | None = None
    perplexity: dict = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int | None = None
    base_on_hub: bool = False
    from_file: bool = False

    def save(self, directory: str | Path) -> Path:
        """Writes `sparselr_report.json` into a directory, without paths, in one step."""
        path = Path(directory) / FILE_NAME
        write_text(path, json.dumps(self.public(), indent=1, allow_nan=False) + "\n")
        return path

    def public(self) -> dict:
        """The content of the file: JSON values (numbers that are not finite become null), no paths."""
        content = {name: getattr(self, name) for name in _TYPES}
        content["base_model"] = hub_id(self.base_model) if self.base_on_hub else None
        content["settings"] = {name: value for name, value in self.settings.items() if name != "save_id"}
        if "calibration" in self.settings:
            content["settings"]["calibration"] = public_source(self.settings["calibration"])
        return plain(content)

    @classmethod
    def load(cls, directory: str | Path) -> "Report | None":
        """The report beside a checkpoint, or None where there is none that can be read; never raises for its content.

        Fields of a later version, and fields with a value of the wrong type, are left out with a warning.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s cannot be read; the model has no report: %r", path, error)
            return None
        if not isinstance(stored, dict):
            logger.warning("%s holds no report: expected a JSON object", path)
            return None
        known = {name: value for name, value in stored.items() if name in _TYPES and _fits(name, value)}
        if left := sorted(stored.keys() - known.keys()):
            logger.warning("%s: fields that this version cannot read are left out: %s", path, ", ".join(left))
        known.setdefault("settings", {})
        return cls(**known, base_on_hub=hub_id(known.get("base_model")) is not None, from_file=True)

    def __str__(self) -> str:
        rows = [("layer", "shape", "pattern", "rank", "zeros", "error", "iterations", "seconds")]
        for row in self.layers:
            rows.append(
                (
                    cell(row, "name"),
                    shape_cell(row),
                    cell(row, "pattern"),
                    rank_cell(row),
                    cell(row, "sparsity", ".4f"),
                    cell(row, "relative_error", ".5f"),
                    cell(row, "iterations"),
                    cell(row, "seconds", ".2f"),
                )
            )
        allocation = [self.allocation_line()] if self.allocation else []
        lines = [table(rows), self.experts_line(), *allocation, *self.refinement_lines()]
        return "\n".join(filter(None, lines))

    def refinement_lines(self) -> list[str]:
        """What refinement did, on which text, a line a step; none where a report file lacks it."""
        lines = []
        for describe in (self._matching, self._distillation, self._self_written):
            with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
                lines += describe()
        return lines

    def _matching(self) -> list[str]:
        found = [row["tm"] for row in self.blocks if row["tm"] and row["tm"]["loss_before"] > 0]
        if not found:
            return []
        judged = [row["loss_after"] / row["loss_before"] for row in found]
        trained = [row["train_loss"][row["best_pass"] - 1] for row in found if row["best_pass"]]
        apart = all(row["kept_back_loss"] for row in found)
        windows = "calibration windows that were kept back" if apart else "trained windows (too few to keep some back)"
        line = (
            f"transformer matching: the squared error of a block's output on {windows} is {fmean(judged):.2f} of that "
            f"before ({min(judged):.2f} to {max(judged):.2f})"
        )
        if trained and apart:
            line += f", on trained windows {fmean(trained):.2f}"
        if len(trained) < len(found):
            line += f"; {len(found) - len(trained)} of {len(found)} blocks got no better and stayed as they were"
        return [line]

    def _distillation(self) -> list[str]:
        if not self.distill:
            return []
        best, losses = self.distill["best_pass"], self.distill["losses"]
        kept_back = self.distill["kept_back"].items()
        judged = " and ".join(f"{each[0]:.4f} to {each[best]:.4f} on {kind} text" for kind, each in kept_back)
        where = f"{judged}, on windows that were kept back"
        if not judged:
            before, after = self.distill["loss_before"], self.distill["loss_after"]
            where = f"{before:.4f} to {after:.4f} on trained windows (too few to keep some back)"
        state = f"of pass {best} of {len(losses)}" if best else "from before: no pass made it better"
        trained = f" (training loss {losses[best - 1]:.4f})" if best else ""
        return [
            f"distillation: the divergence from the dense model, in nats a prediction, goes from {where}; the state is "
            f"that {state}{trained}"
        ]

    def _self_written(self) -> list[str]:
        written = (self.distill or {}).get("self_written", {})
        if not written.get("alike"):
            return []
        continued, others = written["alike"]["prompted"], written["alike"]["plain"]
        return [
            f"self-written text: {written['prompted']:.0%} of the windows continue calibration text; the share of runs "
            "of four tokens that stand in the text before is "
            f"{continued:.1%} in such windows and {others:.1%} in others"
        ]

    def experts_line(self) -> str:
        """The layers of experts that saw fewer than a tenth of an even share of the tokens, in a line; "" without."""
        rows = [row for row in self.layers if _is_number(row.get("tokens")) and _is_number(row.get("share"))]
        stacks = Counter(map(_stack, rows))
        few = [row for row in rows if row["share"] * stacks[_stack(row)] < FEW_TOKENS]
        if not few:
            return ""
        few = sorted(few, key=lambda row: row["tokens"])
        shown = (
            f"{cell(row, 'name')} ({row['tokens']}, error {cell(row, 'relative_error', '.3f')})" for row in few[:4]
        )
        return f"{len(few)} of {len(rows)} layers of experts saw few calibration tokens: {', '.join(shown)}"

    def allocation_line(self) -> str:
        """The choices of a non-uniform allocation, in a line; its name alone where a report file lacks them."""
        try:
            return self._allocation_choices()
        except (LookupError, TypeError, ValueError, AttributeError):
            return str(self.settings.get("allocation", "-"))

    def _allocation_choices(self) -> str:
        zeros, ranks = ([row[field] for row in self.layers] for field in ("sparsity", "rank"))
        line = (
            f"{self.settings['allocation']}: {min(zeros):.2%} to {max(zeros):.2%} zeros, "
            f"rank {min(ranks)} to {max(ranks)}"
        )
        if "parameters" not in self.allocation:
            return line
        parameters, error = self.allocation["parameters"], self.allocation["error"]
        return (
            f"{line}; {parameters['allocated']:,} parameters kept, {parameters['uniform']:,} if uniform; summed error "
            f"of trial solves {error['allocated']:.5f}, {error['uniform']:.5f} if uniform"
        )


def _stack(row: dict) -> str:
    """The stack of experts that a layer's row is in."""
    return str(row.get("name")).rpartition(".")[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cell(row: dict, key: str, spec: str = "") -> str:
    """A value of a row as text; "-" where there is none, or not the number that was expected."""
    value = row.get(key)
    if value is None or (spec and (isinstance(value, bool) or not isinstance(value, (int, float)))):
        return "-"
    return format(value, spec) if spec else str(value)


def shape_cell(row: dict, times: str = "x") -> str:
    """The shape of a layer's row as text."""
    shape = row.get("shape")
    return times.join(map(str, shape)) if isinstance(shape, (list, tuple)) else "-"


def rank_cell(row: dict) -> str:
    """The rank of a layer's flat factors as text; of the blocks of a hierarchy level by level."""
    ranks = row.get("ranks")
    return "/".join(map(str, ranks)) if isinstance(ranks, (list, tuple)) else cell(row, "rank")


def settings_line(settings: dict) -> str:
    """The sparsity and rank of the settings, in a few words."""
    if settings.get("compression") is None:
        form = "" if settings.get("hierarchy") is None else "hierarchical, first "
        return f"sparsity {settings['sparsity']}, {form}rank {settings['rank']}"
    return f"compression {settings['compression']}, rank ratio {settings['rank_ratio']}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of text in aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def layer_line(row: dict) -> str:
    """One log line for a layer."""
    return (
        f"{row['name']}: relative error {row['relative_error']:.5f}, pattern {row['pattern']} "
        f"({row['sparsity']:.2%} zeros), rank {rank_cell(row)}, {row.get('iterations', 0)} iterations, "
        f"{row['seconds']:.2f} s"
    )


def plot(report: Report, directory: str | Path) -> Path:
    """Draws `sparselr_report.png`: the relative error of every layer, a line a kind of layer, and the seconds of every
    block by phase.

    Raises:
        ImportError: matplotlib is not installed (the `plot` extra).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    errors, seconds = figure.subplots(2, sharex=True)
    _draw_errors(errors, report)
    _draw_seconds(seconds, report)
    errors.set_title(f"{report.settings['method']}, {settings_line(report.settings)}")
    path = Path(directory) / "sparselr_report.png"
    figure.savefig(path, dpi=150)
    return path


def _draw_errors(axes: Any, report: Report) -> None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for index, block in enumerate(report.blocks):
        for row in report.layers:
            if row["name"].startswith(f"{block['name']}."):
                kind = row["name"].removeprefix(f"{block['name']}.")
                kinds.setdefault(kind, []).append((index, row["relative_error"]))
    for kind, points in kinds.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind)
    axes.set(ylabel="relative error of the layer's output", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)


def _draw_seconds(axes: Any, report: Report) -> None:
    """Phases that a solver measured lie inside "solve", and are not drawn."""
    names = [name for name in _PHASES if any(name in block["phases"] for block in report.blocks)]
    below = [0.0] * len(report.blocks)
    for name in names:
        heights = [block["phases"].get(name, 0.0) for block in report.blocks]
        axes.bar(range(len(heights)), heights, bottom=below, label=name)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(xlabel="block", ylabel="seconds")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small", ncols=2)


def _fits(name: str, value: Any) -> bool:
    """Whether a report file gives a field a value of its type; rows and sizes are looked at more closely."""
    if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
        return False
    if name in ("layers", "blocks"):
        return all(isinstance(row, dict) for row in value)
    if name in ("sizes", "perplexity"):
        return all(isinstance(size, (int, float, type(None))) for size in value.values())
    return True


def plain(value: Any) -> Any:
    """The value as JSON knows it: numbers that are not finite become None, unknown objects their text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)
