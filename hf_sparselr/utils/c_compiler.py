"""Small C libraries for the CPU, compiled on first use and kept on disk.

A library is native code, so one that another user could have written is never loaded: the cache folder belongs to this
user, nobody else can write to it or replace it, and the name of a library holds the hash of its content.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.constants import HF_HOME

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 120
_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC")
_HUNG: dict[str, str] = {}  # compilers that hung in this process, and the reason to tell
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def load(name: str, source: str, warning: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """Returns the library of a C source with OpenMP; None, after a warning, without a compiler that makes one.

    The same warning is given once a process, and a compiler that hung is not called again.

    Args:
        warning: the consequence and what to do, with a %s for the reason.
        flags: for the compiler, after its usual ones.
    """
    try:
        return ctypes.CDLL(str(_library(name, source, (*_FLAGS, *flags))))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["it says nothing"]
        said = next((line for line in lines if "error" in line), lines[0])
        _warn(warning, f"{error.cmd[0]} returned {error.returncode}: {said}")
    except (OSError, subprocess.SubprocessError) as error:
        _warn(warning, str(error))
    return None


@functools.cache
def _warn(warning: str, reason: str) -> None:
    logger.warning(warning, reason)


def _library(name: str, source: str, flags: tuple[str, ...]) -> Path:
    """The library's file, from the cache of earlier processes if it is there and undamaged."""
    compiler = _compiler()
    key = _digest("\0".join((source, *compiler, *flags, platform.machine())).encode())
    folder = _cache_folder()
    for path in folder.glob(f"{name}-{key}-*.so"):
        if _is_sound(path):
            return path
        path.unlink(missing_ok=True)
    return _compile(folder, f"{name}-{key}", source, [*compiler, *flags])


def _compiler() -> list[str]:
    """The C compiler and its arguments: CC, else the first of cc, gcc and clang."""
    if words := shlex.split(os.environ.get("CC", "")):
        return words
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError("no C compiler found")


def _compile(folder: Path, stem: str, source: str, command: list[str]) -> Path:
    if command[0] in _HUNG:
        raise OSError(_HUNG[command[0]])
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        written, built = Path(directory) / "source.c", Path(directory) / "library.so"
        written.write_text(source, encoding="utf-8")
        try:
            subprocess.run(
                [*command, str(written), "-o", str(built), "-lm"],
                check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            _HUNG[command[0]] = f"{command[0]} timed out after {COMPILE_SECONDS} seconds"
            raise OSError(_HUNG[command[0]]) from None
        target = folder / f"{stem}-{_digest(built.read_bytes())}.so"
        built.replace(target)  # whole or not at all, even if another process compiles it now
    return target


def _is_sound(path: Path) -> bool:
    """Whether a cached library is this user's own regular file with the content that its name says."""
    try:
        if not (stat.S_ISREG(path.lstat().st_mode) and _is_own(path)):
            return False
        return path.stem.endswith(f"-{_digest(path.read_bytes())}")
    except OSError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _cache_folder() -> Path:
    """The first folder that this user can write to and nobody else: persistent if possible, else for this process."""
    for folder in _persistent_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK) and _is_private(folder):
            return folder
    return _process_folder()


def _persistent_folders() -> Iterator[Path]:
    yield Path(HF_HOME) / "hf_sparselr"
    yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_sparselr"


@functools.cache
def _process_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hf_sparselr-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_private(folder: Path) -> bool:
    """Whether no other user can change the content of a folder, or put another folder in its place."""
    folder = folder.resolve()
    return _is_own(folder) and all(map(_keeps_its_entries, folder.parents))


def _is_own(path: Path) -> bool:
    status = path.lstat()
    return not _has_users() or (status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE)


def _keeps_its_entries(folder: Path) -> bool:
    """Whether other users cannot rename or replace the files that this user or root put into a folder."""
    status = folder.stat()
    if not _has_users():
        return True
    closed = not status.st_mode & _OTHERS_WRITE or bool(status.st_mode & stat.S_ISVTX)
    return closed and status.st_uid in (0, os.geteuid())


def _has_users() -> bool:
    return hasattr(os, "geteuid")
