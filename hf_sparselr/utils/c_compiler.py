"""Small C libraries for the CPU, compiled on first use and kept on disk."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME

logger = logging.getLogger(__name__)

_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC")


def load(name: str, source: str, warning: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library of a C source with OpenMP; without a compiler that makes one, None and a warning.

    Args:
        warning: what that means and what to do, with a %s for the reason.
    """
    try:
        return ctypes.CDLL(str(_compile(name, source, flags)))
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning(warning, error)
        return None


def _compile(name: str, source: str, flags: tuple[str, ...]) -> Path:
    """The library's file, from the cache of earlier processes if it is there."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler found")
    flags = (*_FLAGS, *flags)
    key = hashlib.sha256("".join((source, *flags)).encode()).hexdigest()[:16]
    target = Path(HF_HOME) / "hf_sparselr" / f"{name}-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            written, built = Path(directory) / f"{name}.c", Path(directory) / f"{name}.so"
            written.write_text(source)
            subprocess.run(
                [compiler, *flags, str(written), "-o", str(built), "-lm"],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            built.replace(target)  # whole or not at all, whoever else compiles it now
    return target
