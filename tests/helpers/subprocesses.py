"""Code in a new interpreter, without the installed entry point."""

import os
import subprocess
import sys


def run(code, *paths, cwd):
    """Runs code in a new interpreter without the installed entry point; `paths` lead its import path."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # the tests call what the entry point calls
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=100
    )


def check(code, *paths, cwd):
    result = run(code, *paths, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result
