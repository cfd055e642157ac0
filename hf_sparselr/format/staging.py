"""A save as a transaction: files are written beside the old ones, and moved into place when all are complete.

A save that fails or is killed before that leaves the folder as it was. While files are moved, which takes
milliseconds, a kill leaves files of two saves, which `check_seal` refuses to load together; the new files are then
complete, some of them still in the staging folder. Power loss is another matter: files are not flushed to the disk.
"""

import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from .checkpoint import CONFIG

_PREFIX = ".sparselr-save-"
_PARTIAL, _COMPLETE = ".partial", ".complete"
_STAGING = re.compile(rf"{re.escape(_PREFIX)}(.*)-(\d+)-[0-9a-f]{{8}}\.(?:partial|complete)")
_ABANDONED = 3600  # seconds without a write


def weight_file(variant: str | None = None) -> re.Pattern:
    """Matches names of weight files and of their index, as transformers names them."""
    end = f"\\.{re.escape(variant)}" if variant else ""
    shard = r"(-\d{5}-of-\d{5})?"
    return re.compile(rf"model{end}{shard}\.safetensors|model\.safetensors\.index{end}\.json")


class Staging:
    """A folder inside `directory` in which a save is written; a context manager.

    On an exception before `commit` has moved a file, the folder vanishes, and `directory` too if it was made for it.
    """

    def __init__(self, directory: str | os.PathLike, variant: str | None = None) -> None:
        self.directory = Path(directory)
        self.variant = variant
        self.committed = self._moving = False
        self.folder = self.directory / f"{_PREFIX}{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{_PARTIAL}"

    def __enter__(self) -> "Staging":
        self._made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._moving:  # the files that are left are complete, and needed
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # something else is in it by now
                return

    def commit(self) -> list[str]:
        """Moves the files into place, config.json last, and removes weight files that are not among them.

        Returns:
            Names of the files that were moved, relative to `directory`.
        """
        complete = self.folder.with_suffix(_COMPLETE)
        os.rename(self.folder, complete)
        self.folder = complete
        names = [str(path.relative_to(complete)) for path in sorted(complete.rglob("*")) if path.is_file()]
        matches = weight_file(self.variant).fullmatch
        order = sorted(names, key=lambda name: (name == CONFIG, not matches(name), name))
        for number, name in enumerate(order):
            target = self.directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._moving = True
            try:
                os.replace(complete / name, target)
            except OSError:
                self._moving = number > 0
                raise
        for name in stale(os.listdir(self.directory), names, self.variant):
            os.remove(self.directory / name)
        shutil.rmtree(complete, ignore_errors=True)
        for folder in self.directory.glob(f"{_PREFIX}*"):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        self.committed, self._moving = True, False
        return names


def stale(present: Iterable[str], written: Iterable[str], variant: str | None = None) -> list[str]:
    """Names of weight files that a save did not write, and that would be mixed with or preferred to its own."""
    matches, written = weight_file(variant).fullmatch, set(written)
    return [name for name in present if matches(name) and name not in written]


def unfinished(directory: Path) -> Path | None:
    """The folder with the rest of a save that was interrupted while its files were moved."""
    return next(iter(sorted(directory.glob(f"{_PREFIX}*{_COMPLETE}"))), None)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file in one step: readers see the old content or the new."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.write_text(text, encoding="utf-8", newline="")  # line ends stay as they are
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _is_abandoned(folder: Path) -> bool:
    """Whether nobody writes to a staging folder any more: its process is gone, or has left it for an hour."""
    named = _STAGING.fullmatch(folder.name)
    if named is None:
        return False
    node, pid = named.groups()
    if os.name == "posix" and node == platform.node() and int(pid) != os.getpid():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
    try:
        newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return False
    return time.time() - newest > _ABANDONED
