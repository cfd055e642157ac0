"""What a compression run did: one row a layer, one row a block, printed and saved as JSON."""

import json
from dataclasses import dataclass, field
from pathlib import Path

FILE_NAME = "sparselr_report.json"


@dataclass
class Report:
    """The result of a run; `model.sparselr_report`.

    Attributes:
        settings: the config as stored in config.json.
        layers: a dict a layer: name, shape, pattern, rank, sparsity (share of zeros), relative_error
            (tr(E H E^T) / tr(W H W^T) on the calibration inputs, before refinement), iterations, seconds, ...
        allocation: measurements and choices of a non-uniform allocation, {} for a uniform one.
        distill: losses (a pass), loss_before, loss_after, passes, seconds; None without distillation.
        blocks: a dict a block: name, tm (loss_before, loss_after, ...; None without refinement), seconds, phases
            ({phase: seconds}), peaks ({phase: bytes on the GPU}).
        sizes: bytes of the model dense and packed, {"dense": ..., "packed": ...}.
        base_model: the dense model's name.
        perplexity: measured perplexities, {"dense": ..., "compressed": ...}, or {}.
        seconds: the whole run.
        peak_memory: bytes on the GPU, None on the CPU.
    """

    settings: dict
    layers: list[dict] = field(default_factory=list)
    blocks: list[dict] = field(default_factory=list)
    allocation: dict = field(default_factory=dict)
    distill: dict | None = None
    sizes: dict = field(default_factory=dict)
    base_model: str | None = None
    perplexity: dict = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int | None = None

    def save(self, directory: str | Path) -> Path:
        """Writes `sparselr_report.json` into a directory."""
        path = Path(directory) / FILE_NAME
        path.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> "Report | None":
        """The report beside a checkpoint, or None where there is none."""
        path = Path(directory) / FILE_NAME
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def __str__(self) -> str:
        rows = [("layer", "shape", "pattern", "rank", "zeros", "error", "iterations", "seconds")]
        for row in self.layers:
            rows.append(
                (
                    row["name"],
                    "x".join(map(str, row["shape"])),
                    row["pattern"],
                    str(row["rank"]),
                    f"{row['sparsity']:.4f}",
                    f"{row['relative_error']:.5f}",
                    str(row.get("iterations", "-")),
                    f"{row['seconds']:.2f}",
                )
            )
        return "\n".join([table(rows), *([self.allocation_line()] if self.allocation else [])])

    def allocation_line(self) -> str:
        """The choices of a non-uniform allocation, in a line."""
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


def settings_line(settings: dict) -> str:
    """The sparsity and rank of the settings, in a few words."""
    if settings.get("compression") is None:
        return f"sparsity {settings['sparsity']}, rank {settings['rank']}"
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
        f"({row['sparsity']:.2%} zeros), rank {row['rank']}, {row.get('iterations', 0)} iterations, "
        f"{row['seconds']:.2f} s"
    )


def plot(report: Report, directory: str | Path) -> Path:
    """Draws the relative error of every layer, a line a kind of layer, to `sparselr_report.png`.

    Raises:
        ImportError: matplotlib is not installed (the `plot` extra).
    """
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[int, float]]] = {}
    for index, block in enumerate(report.blocks):
        for row in report.layers:
            if row["name"].startswith(f"{block['name']}."):
                kind = row["name"].removeprefix(f"{block['name']}.")
                kinds.setdefault(kind, []).append((index, row["relative_error"]))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, points in kinds.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind)
    axes.set(xlabel="block", ylabel="relative error of the layer's output", yscale="log")
    axes.set_title(f"{report.settings['method']}, {settings_line(report.settings)}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    path = Path(directory) / "sparselr_report.png"
    figure.savefig(path, dpi=150)
    return path
