"""`transformers serve` and `transformers chat` on loopback with a packed checkpoint."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny
from helpers.paths import ROOT
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from hf_sparselr import compress

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")

TOKENS = 8
MESSAGES = [{"role": "user", "content": "def read_file(path):"}]
CLI = "from transformers.cli.transformers import main; main()"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    model = tiny.build("llama", vocab_size=4096)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    compress(model, tiny.settings()).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def answer(checkpoint):
    """What generate makes of the conversation."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), tiny.tokenizer()
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    assert len(tokens) == TOKENS
    return tokenizer.decode(tokens, skip_special_tokens=True)


@contextlib.contextmanager
def served(checkpoint: Path, log: Path, *flags: str):
    """The port of a server on 127.0.0.1 that has the checkpoint loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        CLI,
        "serve",
        str(checkpoint),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen([*command, *flags], env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    try:
        return ask(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def ask(port: int, method: str, path: str, body: dict | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def chat(port: int, checkpoint: Path, **changes) -> str:
    body = {"model": str(checkpoint), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0, **changes}
    status, text = ask(port, "POST", "/v1/chat/completions", body)
    assert status == 200, text
    return text


def streamed(text: str) -> str:
    """The message that a stream of server-sent events spells."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    assert len(lines) > 2
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.fixture(scope="module")
def port(checkpoint, tmp_path_factory):
    with served(checkpoint, tmp_path_factory.mktemp("log") / "log") as port:
        yield port


def check_answers(port: int, checkpoint: Path, answer: str) -> None:
    assert json.loads(chat(port, checkpoint))["choices"][0]["message"]["content"] == answer
    assert streamed(chat(port, checkpoint, stream=True)) == answer


def test_the_server_answers_as_generate_does(port, checkpoint, answer):
    check_answers(port, checkpoint, answer)


def test_so_it_does_with_continuous_batching(checkpoint, answer, tmp_path):
    blocks = ("--cb-num-blocks", "16", "--cb-block-size", "16")
    with served(checkpoint, tmp_path / "log", "--continuous-batching", *blocks) as port:
        check_answers(port, checkpoint, answer)


def test_the_chat_command_talks_to_it(port, checkpoint, answer):
    command = [sys.executable, "-c", CLI, "chat", str(checkpoint), f"http://127.0.0.1:{port}/v1"]
    told = f"{MESSAGES[0]['content']}\n!exit\n"
    options = [f"max_new_tokens={TOKENS}", "do_sample=False"]
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # it forbids loopback, too
    done = subprocess.run([*command, *options], input=told, env=env, capture_output=True, text=True, timeout=120)
    assert "".join(answer.split()) in "".join(done.stdout.split()), done.stdout + done.stderr


def test_the_example_serves_both_side_by_side(checkpoint, tmp_path):
    tiny.build("llama", vocab_size=4096).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    example = ROOT / "examples" / "serve_and_compare.py"
    command = [
        sys.executable,
        str(example),
        str(tmp_path),
        str(checkpoint),
        "--tokens",
        "4",
        "--prompt",
        "def",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["dense", "compressed"]
    assert all(float(row[-1]) > 0 for row in rows[2:])
