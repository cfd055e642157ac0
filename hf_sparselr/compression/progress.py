"""The progress of a run: a line on the terminal, and the same in a file, `run.jsonl`, a JSON object a line.

Every object has an `event` and a `time` (UTC):

    start    blocks, finished (by an earlier run)
    block    name, done, blocks, seconds (of the block), remaining (seconds, from the blocks of this run), error (mean
             relative error of its layers), loss (of transformer matching, or null), phases {name: seconds},
             host_memory and gpu_memory (bytes; null if unknown), restored (taken from an earlier run)
    distill  passes, loss
    end      seconds

"""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from ..utils.memory import resident_memory
from .report import plain

FILE_NAME = "run.jsonl"


class Progress:
    """
    Args:
        path: of the file, or None for none.
        goes_on: the file gets more lines; otherwise it starts anew.

    Attributes:
        line: what the bar says of the last block, beside the count.
    """

    line = ""

    def __init__(self, path: Path | None = None, goes_on: bool = False) -> None:
        self._path, self._goes_on = path, goes_on
        self._seconds: list[float] = []
        self._done = self._blocks = self._passes = 0
        self._bar: Any = None

    def start(self, blocks: int, finished: int) -> None:
        """Begins with so many blocks, some of which an earlier run finished."""
        self._blocks = blocks
        self._bar = transformers_logging.tqdm(total=blocks, desc="Compressing blocks", unit="block")
        self._write("start", blocks=blocks, finished=finished)

    def block(self, row: dict, layer_rows: list[dict], restored: bool) -> None:
        """Notes a finished block.

        Args:
            row, layer_rows: of the report.
        """
        self._done += 1
        if not restored:
            self._seconds.append(row["seconds"])
        each = sum(self._seconds) / len(self._seconds) if self._seconds else None
        left = None if each is None else each * (self._blocks - self._done)
        errors = [layer["relative_error"] for layer in layer_rows if layer["relative_error"] is not None]
        found = {
            "remaining": left,
            "error": sum(errors) / len(errors) if errors else None,
            "loss": row["tm"]["loss_after"] if row["tm"] else None,
            "host_memory": resident_memory(),
            "gpu_memory": max(row["peaks"].values(), default=None),
        }
        self.line = _line(each, **found)
        self._bar.set_postfix_str(self.line, refresh=False)
        self._bar.update()
        own = {"name": row["name"], "done": self._done, "blocks": self._blocks, "seconds": row["seconds"]}
        self._write("block", **own, **found, phases=row["phases"], restored=restored)

    def blocks_done(self) -> None:
        """Ends the line."""
        self._bar.close()

    def distill(self, loss: float) -> None:
        """Notes a pass of distillation and its loss."""
        self._passes += 1
        self._write("distill", passes=self._passes, loss=loss)

    def end(self, seconds: float) -> None:
        """Notes that the model is packed."""
        self._write("end", seconds=seconds)

    def _write(self, event: str, **values: Any) -> None:
        if self._path is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps(plain({"event": event, "time": now, **values}), allow_nan=False)
        with self._path.open("a" if self._goes_on else "w", encoding="utf-8") as file:
            file.write(line + "\n")
        self._goes_on = True


def _line(
    each: float | None,
    remaining: float | None,
    error: float | None,
    loss: float | None,
    host_memory: int | None,
    gpu_memory: int | None,
) -> str:
    parts = [] if each is None or remaining is None else [f"{each:.1f} s/block", f"{_duration(remaining)} left"]
    parts += [] if gpu_memory is None else [f"GPU {gpu_memory / 1e9:.1f} GB"]
    parts += [] if host_memory is None else [f"host {host_memory / 1e9:.1f} GB"]
    parts += [] if error is None else [f"error {error:.4f}"]
    parts += [] if loss is None else [f"loss {loss:.2e}"]
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
