"""Small C libraries for the CPU, compiled on first use and kept on disk."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME

UNAVAILABLE = (OSError, subprocess.CalledProcessError)  # what `load` raises where it cannot compile or load
_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC")


def load(name: str, source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of a C source with OpenMP, from the cache of earlier processes if it is there.

    Raises:
        OSError, subprocess.CalledProcessError: no C compiler, or one that fails.
    """
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
    return ctypes.CDLL(str(target))
