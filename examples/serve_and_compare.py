"""Serves a dense model and its compressed form side by side, and prints their answers, speed and memory.

Both run as OpenAI-compatible servers on 127.0.0.1, by transformers (`pip install "transformers[serving]"`) or by vLLM.
Without models, the embedded language model of Python source is compressed first.

    python examples/serve_and_compare.py [DENSE COMPRESSED] [--engine transformers|vllm] [--prompt TEXT ...]
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

DENSE = Path(__file__).parent / "pylm-4m"
PROMPTS = ["def read_file(path):\n", "import os\nimport sys\n\nclass", "for i in range(10):"]
COMMANDS = {
    "transformers": [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"],
    "vllm": ["vllm", "serve"],
}


@dataclass
class Server:
    """A running server.

    Attributes:
        name: what the tables call it.
        model: a directory, or a Hub id.
        port: on 127.0.0.1.
        process: the leader of a process group of its own.
    """

    name: str
    model: str
    port: int
    process: subprocess.Popen

    def complete(self, prompt: str, tokens: int) -> tuple[str, int, float]:
        """(text, number of its tokens, seconds), decoded greedily."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        started = time.perf_counter()
        try:
            answer = self.ask("POST", "/v1/completions", body)
        except OSError as error:
            raise RuntimeError(f"{self.name}: the server stopped; its output is above") from error
        seconds = time.perf_counter() - started
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"], seconds

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise RuntimeError(f"{self.name}: {method} {path} gave {response.status}: {text}")
        return json.loads(text or "{}")

    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name}: the server stopped; its output is above")
        try:
            self.ask("GET", "/health")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def memory(self) -> int | None:
        """Bytes that the server's processes hold on the GPU, or else in main memory; None where Linux does not say."""
        pids = [entry.name for entry in Path("/proc").glob("[0-9]*") if group_of(int(entry.name)) == self.process.pid]
        return gpu_memory(pids) or sum(map(resident, pids)) or None


def group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def resident(pid: str) -> int:
    try:
        return int(Path("/proc", pid, "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def gpu_memory(pids: list[str]) -> int:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return 0
    held = (line.split(",") for line in lines)
    return sum(int(used) << 20 for pid, used in held if pid.strip() in pids and used.strip().isdigit())


@contextlib.contextmanager
def serving(name: str, model: str, engine: str):
    """A server of the model that answers; it is stopped in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*COMMANDS[engine], model, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    server = Server(name, model, port, process)
    try:
        while not server.is_ready():
            time.sleep(0.5)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def compress_embedded(folder: Path) -> str:
    """The embedded model at 2:4 and rank 16, calibrated on the standard library."""
    from transformers import AutoTokenizer

    import hf_sparselr

    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    config = hf_sparselr.SparseLRConfig(
        rank=16,
        effort="fast",
        calibration=f"file:{sysconfig.get_path('stdlib')}/[a-f]*.py",
        num_samples=32,
        seq_len=256,
        tokenizer=tokenizer,
    )
    hf_sparselr.compress(str(DENSE), config, output_dir=folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def weight_bytes(model: str) -> str:
    files = list(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB" if files else "-"


def compare(servers: list[Server], prompts: list[str], tokens: int) -> None:
    speeds = {server.name: [0, 0.0] for server in servers}
    for server in servers:
        server.complete(prompts[0], tokens)  # the first answer waits for kernels to be chosen and compiled
    for prompt in prompts:
        print(f"\n=== {prompt!r}")
        for server in servers:
            text, count, seconds = server.complete(prompt, tokens)
            speeds[server.name][0] += count
            speeds[server.name][1] += seconds
            print(f"--- {server.name}\n{text}")
    print("\n| model | weights on disk | server's memory | tokens a second |\n|---|---|---|---|")
    for server in servers:
        count, seconds = speeds[server.name]
        memory = server.memory()
        shown = f"{memory / 1e6:,.0f} MB" if memory else "-"
        print(f"| {server.name} | {weight_bytes(server.model)} | {shown} | {count / seconds:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="DENSE COMPRESSED")
    parser.add_argument("--engine", choices=sorted(COMMANDS), default="transformers")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--tokens", type=int, default=48, help="generated for each prompt")
    options = parser.parse_args()
    if len(options.models) not in (0, 2):
        parser.error(f"models={options.models}: expected two, DENSE COMPRESSED, or none")
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or [str(DENSE), compress_embedded(Path(folder))]
        with (
            serving("dense", models[0], options.engine) as dense,
            serving("compressed", models[1], options.engine) as compressed,
        ):
            compare([dense, compressed], options.prompt or PROMPTS, options.tokens)


if __name__ == "__main__":
    main()
