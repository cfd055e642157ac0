"""The folder of an unfinished run: its finished blocks, and a manifest that says which run they belong to.

It lies inside the output folder, which holds no checkpoint until the run is complete. Every file is written under
another name, flushed to the disk and renamed, the manifest after the block that it names. So a kill at any moment
leaves whole blocks. A later run with the same arguments takes them over; it only repeats their forward passes.
"""

import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..utils.world import ALONE, World
from .report import plain

try:
    import fcntl
except ImportError:  # not on Windows, where nothing stops two runs in one folder
    fcntl = None

NAME = ".sparselr-run"
MANIFEST = "manifest.json"
VERSION = 1  # of the manifest

logger = logging.getLogger("hf_sparselr")


@dataclass(frozen=True)
class FinishedBlock:
    """A block in the folder.

    Attributes:
        name: of the block in the model.
        checksum: CRC-32 of its tensors, in the order of their names.
        row, layer_rows, dense: for the report, see `block.BlockResult`.
    """

    name: str
    checksum: int
    row: dict
    layer_rows: list[dict]
    dense: dict[str, str]


class RunFolder:
    """A context manager. An error before the first block is finished removes the folder.

    Args:
        output_dir: the output folder; made if it is missing.
        identity: everything that decides about the result, as JSON values.
        overwrite: discard an unfinished run with another identity.
        world: the processes that share the work; the first one writes.

    Attributes:
        finished: {name: block} that an earlier run, or this one, finished.

    Raises:
        ValueError: the folder holds an unfinished run with another identity, or one that still runs.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        identity: Mapping[str, Any],
        overwrite: bool = False,
        world: World = ALONE,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / NAME
        self.identity = plain(dict(identity))
        self._overwrite, self._world = overwrite, world
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self.finished: dict[str, FinishedBlock] = {}

    def __enter__(self) -> "RunFolder":
        self._made: list[Path] = []
        self._lock: Any = None
        try:
            if self._world.first:
                self._open()
        except OSError as error:
            raise self._told(error) from error
        self.finished = self._world.of_first(self.finished)
        return self

    def _open(self) -> None:
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        try:
            self._read()
            for left in self.path.glob("*.partial"):
                left.unlink()
        except BaseException:
            self._lock.close()
            raise

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with suppress(OSError):  # an error that is told is the one that ended the run
            self._settle()
        self._writer.shutdown()
        if not self._world.first:
            return
        self._lock.close()
        if error is None:
            try:
                self._flush_output()
            except OSError as failure:
                raise self._told(failure) from failure
            self._remove(made=False)
            return
        if not self.finished:
            self._remove(made=True)
        told = self._told(error)
        if told is not error:
            raise told from error
        if not self.finished:
            return
        advice = (
            f"{len(self.finished)} finished blocks are kept in {self.path}: the same call goes on after them. Delete "
            "that folder to give the run up"
        )
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(advice) from error
        logger.warning(advice)

    def _told(self, error: BaseException) -> BaseException:
        """The error, or for a disk that is full one that says what to do."""
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            return error
        free = shutil.disk_usage(self.output_dir if self.output_dir.exists() else self.output_dir.parent).free
        return OSError(
            errno.ENOSPC,
            f"output_dir={str(self.output_dir)!r}: the disk is full ({free:,} bytes are free). Free some, and start "
            "the run again with the same arguments: it goes on after the last finished block",
        )

    def file(self, name: str) -> Path:
        """Where the tensors of a finished block are."""
        self._settle()
        return self.path / f"{name}.safetensors"

    def store(
        self, name: str, block: nn.Module, row: dict, layer_rows: list[dict], dense: dict[str, str], shared: Set[int]
    ) -> None:
        """Stores a finished block, unless it is stored. It is flushed to the disk while the next one is worked on.

        Args:
            shared: ids of tensors that other parts of the model share, which are left out.
        """
        if name not in self.finished and self._world.first:
            self._store(name, block, row, layer_rows, dense, shared)
        if self._world.size > 1:
            self._settle()
            self.finished[name] = self._world.of_first(self.finished.get(name))

    def _store(
        self, name: str, block: nn.Module, row: dict, layer_rows: list[dict], dense: dict[str, str], shared: Set[int]
    ) -> None:
        self._settle()
        tensors = {
            inner: tensor.detach().cpu().contiguous()
            for inner, tensor in block.state_dict(keep_vars=True).items()
            if isinstance(tensor, torch.Tensor) and id(tensor) not in shared
        }
        entry = FinishedBlock(name, _checksum(tensors), plain(row), plain(layer_rows), dense)
        path = self.path / f"{name}.safetensors"
        try:
            save_file(tensors, _beside(path))
        except BaseException:
            _beside(path).unlink(missing_ok=True)
            raise
        self._pending = self._writer.submit(self._complete, path, entry)

    def _complete(self, path: Path, entry: FinishedBlock) -> None:
        _rename_durably(path)
        self.finished[entry.name] = entry
        self._write()

    def _settle(self) -> None:
        """Waits until the last block is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _read(self) -> None:
        path = self.path / MANIFEST
        if not path.is_file():
            self._write()
            return
        stored = json.loads(path.read_text(encoding="utf-8"))
        differences = _differences(self.identity, stored["identity"])
        if stored["version"] != VERSION or differences:
            if not self._overwrite:
                raise ValueError(
                    f"output_dir={str(self.output_dir)!r} holds an unfinished run with other arguments: "
                    f"{'; '.join(differences) or 'of another version of this package'}. Pass the same ones to go on "
                    "with it, another folder, or overwrite=True to discard it"
                )
            for file in self.path.glob("*.safetensors"):
                file.unlink()
            self._write()
            return
        blocks = [FinishedBlock(**entry) for entry in stored["blocks"]]
        self.finished = {block.name: block for block in blocks if self._is_whole(block)}

    def _is_whole(self, block: FinishedBlock) -> bool:
        try:
            with safe_open(self.file(block.name), framework="pt") as reader:
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
                whole = _checksum(tensors) == block.checksum
        except (OSError, SafetensorError):
            whole = False
        if not whole:
            logger.warning("%s is damaged: the block is compressed again", self.file(block.name))
        return whole

    def _write(self) -> None:
        blocks = [asdict(block) for block in self.finished.values()]
        text = json.dumps({"version": VERSION, "identity": self.identity, "blocks": blocks}, indent=1)
        path = self.path / MANIFEST
        _beside(path).write_text(text + "\n", encoding="utf-8")
        _rename_durably(path)

    def _flush_output(self) -> None:
        """The checkpoint reaches the disk before the blocks that it was made of are deleted."""
        for file in self.output_dir.iterdir():
            if file.is_file():
                _flush(file, os.O_RDWR)

    def _remove(self, made: bool) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        for path in self._made if made else ():
            try:
                path.rmdir()
            except OSError:  # something else is in it by now
                return


def _beside(path: Path) -> Path:
    """The name under which a file is written."""
    return path.with_name(f"{path.name}.partial")


def _rename_durably(path: Path) -> None:
    """Flushes the file beside a path to the disk, and gives it its name."""
    _flush(_beside(path), os.O_RDWR)
    os.replace(_beside(path), path)
    if os.name == "posix":
        _flush(path.parent, os.O_RDONLY)


def _flush(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> Any:
    """A file that is locked while this process has it open.

    Raises:
        ValueError: another process has it.
    """
    file = (path / "lock").open("w")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(f"output_dir={str(path.parent)!r}: another process is compressing into it") from error
        except OSError as error:  # a file system without locks
            logger.debug("%s: %r", path, error)
    return file


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _differences(mine: Any, stored: Any, name: str = "") -> list[str]:
    """Values that differ, as text."""
    if isinstance(mine, dict) and isinstance(stored, dict):
        keys = sorted(mine.keys() | stored.keys())
        return [
            line
            for key in keys
            for line in _differences(mine.get(key), stored.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if mine == stored else [f"{name}={mine!r} (there: {stored!r})"]
