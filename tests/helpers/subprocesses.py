"""Code in a process of its own: a new interpreter, or a fork of one that has imported torch and nothing else."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT = 100  # seconds
# torch and the parts of it that transformers and peft import: more than half of the seconds that a test would wait.
_SERVER = """
import json, os, signal, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor

def work(job):
    for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(path, os.O_RDWR), number)
    signal.alarm(job["timeout"])
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.path[1:1] = filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
        torch._import_device_backends()
    try:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
        return 0
    except BaseException:
        traceback.print_exc()
        return 1

for line in sys.stdin:
    child = os.fork()
    if not child:
        code = work(json.loads(line))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(code, *paths, cwd, torch_imported=False):
    """Runs code in a new process without the installed entry point; `paths` lead its import path.

    Args:
        torch_imported: whether torch may be imported before the code runs, which saves seconds.
    """
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # the tests call what the entry point calls
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    if torch_imported:
        return fork(code, env, cwd)
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT
    )


def check(code, *paths, cwd, torch_imported=False):
    result = run(code, *paths, cwd=cwd, torch_imported=torch_imported)
    assert result.returncode == 0, result.stderr
    return result


def fork(code: str, env: dict[str, str], cwd: Path | str, timeout: int = TIMEOUT) -> subprocess.CompletedProcess:
    """Runs code as `python -c` does, in a fork of a process that has imported torch before `env` was set."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        job = {"code": code, "env": env, "cwd": str(cwd), "timeout": timeout}
        server = _server()
        server.stdin.write(json.dumps({**job, **{path.name: str(path) for path in outputs}}) + "\n")
        server.stdin.flush()
        return subprocess.CompletedProcess(code, int(server.stdout.readline()), *(path.read_text() for path in outputs))


@functools.cache
def _server() -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, "-c", _SERVER], env=env, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.communicate)  # closes its input, which ends it
    return server
