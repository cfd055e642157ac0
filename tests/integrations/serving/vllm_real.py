"""vLLM itself serves compressed checkpoints on the CPU: tokens and log-probabilities against transformers.

`.ci/vllm` makes an environment for it and runs it. Names of runs as arguments select some; each starts an engine, which
takes half a minute (compiled, one or two). Not part of the test suite.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
import transformers as tf

import hf_sparselr
from hf_sparselr import SparseLRConfig, compress

ROOT = Path(__file__).parents[3]
PYLM = ROOT / "examples" / "pylm-4m"
TOKENS = 16  # generated for a prompt
TOLERANCE = 1e-3  # of log-probabilities in FP32
SETTINGS = {
    "refine": None,
    "num_samples": 4,
    "seq_len": 64,
    "method_options": {"min_iterations": 10, "max_iterations": 20},
}
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}  # heads of 32: the fewest that vLLM's CPU attention takes
# The rebuild for CPUs is a distribution of another name, whose version the command asks for in vain.
COMMAND = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
GPT2 = {"vocab_size": 128, "n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "eos_token_id": 2}
OPT = {**SMALL, "ffn_dim": 192, "word_embed_proj_dim": 128}
FAMILIES = {
    "phi3": (tf.Phi3ForCausalLM, lambda: tf.Phi3Config(**GROUPED), {"sparsity": "2:4"}),  # fused on disk
    "qwen2": (tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**GROUPED), {"sparsity": 0.5}),  # biases on q, k, v
    "tied": (
        tf.LlamaForCausalLM,
        lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
        {"sparsity": "1:4"},
    ),
    "gpt2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(**GPT2), {"sparsity": "2:4"}),  # weights are (in, out)
    "opt": (tf.OPTForCausalLM, lambda: tf.OPTConfig(**OPT), {"sparsity": "2:4", "rank": 0}),
}
PYLMS = {
    "2of4": {"sparsity": "2:4", "rank": 16},
    # Different numbers of nonzeros in q, k, v; layers of rank 0; one dense layer beside packed ones, one alone.
    "half": {
        "sparsity": 0.5,
        "rank": 16,
        "overrides": {"k_proj": {"rank": 0}},
        "ignore": [r"layers\.1\.self_attn\.v_proj", r"layers\.2\.mlp\.down_proj"],
        "allocation": "owl",
    },
}
# run: (checkpoint, options of vllm.LLM, whether an adapter is served, too)
RUNS = {
    "2of4": ("2of4", {"enforce_eager": True}, False),
    "half-lora": ("half", {"enforce_eager": True}, True),
    "2of4-compiled-lora": ("2of4", {}, True),
    "half-compiled": ("half", {}, False),
    "half-transformers": ("half", {"enforce_eager": True, "model_impl": "transformers"}, False),
    "2of4-transformers-lora": ("2of4", {"enforce_eager": True, "model_impl": "transformers"}, True),
    "2of4-two-ranks": ("2of4", {"enforce_eager": True, "tensor_parallel_size": 2}, False),
    "half-two-ranks": ("half", {"enforce_eager": True, "tensor_parallel_size": 2}, False),
    "phi3-two-ranks": ("phi3", {"enforce_eager": True, "tensor_parallel_size": 2}, False),
    **{name: (name, {"enforce_eager": True}, False) for name in FAMILIES},
}


# --- the engine's side, in a process of its own


def serve_prompts(request: dict) -> dict:
    """Starts an engine on request["model"]; tokens and log-probabilities of its prompts, for each adapter in turn."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    started = time.time()
    options = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, **request["options"]}
    engine = LLM(model=request["model"], **options)
    found = {"seconds": time.time() - started, "results": []}
    # On the CPU vLLM's LoRA cannot score prompts.
    scores = None if options.get("enable_lora") else 0
    sampling = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=scores,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    for number, adapter in enumerate(request["adapters"], 1):
        lora = LoRARequest(f"adapter{number}", number, adapter) if adapter else None
        outputs = engine.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
        for output in outputs:
            tokens = list(output.outputs[0].token_ids)
            steps = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
            chosen = [*output.prompt_token_ids[1:], *tokens][-len(steps) :]
            logprobs = [step[token].logprob for step, token in zip(steps, chosen, strict=True)]
            found["results"].append({"tokens": tokens, "logprobs": logprobs})
    return found


def engine_main(file: Path) -> None:
    request = json.loads(file.read_text())
    try:
        answer = serve_prompts(request)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    file.with_suffix(".answer").write_text(json.dumps(answer))


def ask(folder: Path, model: Path, prompts: list, options: dict, adapters: list = (None,), **environment) -> dict:
    """`serve_prompts` in a fresh process."""
    file = folder / "request.json"
    adapters = [adapter and str(adapter) for adapter in adapters]
    request = {"model": str(model), "prompts": prompts, "options": options, "adapters": adapters}
    file.write_text(json.dumps(request))
    file.with_suffix(".answer").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--engine", str(file)]
    done = subprocess.run(command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True)
    if not file.with_suffix(".answer").is_file():
        raise RuntimeError(f"the engine died:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    answer = json.loads(file.with_suffix(".answer").read_text())
    return {"error": None, **answer, "log": done.stdout + done.stderr}


def check_served(answer: dict) -> None:
    if answer["error"]:
        raise RuntimeError(f"{answer['error']}\n{answer['log'][-3000:]}")


# --- transformers' side


@torch.no_grad()
def reference(model: torch.nn.Module, prompts: list) -> list[dict]:
    """What transformers generates, and the log-probabilities of prompts and generated tokens."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        chosen = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        results.append({"tokens": ids[0, len(prompt) :].tolist(), "logprobs": chosen.tolist()})
    return results


def compare(found: list[dict], expected: list[dict]) -> float:
    """The largest difference of log-probabilities."""
    assert len(found) == len(expected)
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["tokens"] == theirs["tokens"], (mine["tokens"], theirs["tokens"])
        scores = theirs["logprobs"][-len(mine["logprobs"]) :]
        worst = max(worst, *(abs(a - b) for a, b in zip(mine["logprobs"], scores, strict=True)))
    assert worst <= TOLERANCE, f"log-probabilities differ by {worst}"
    return worst


class Workshop:
    """Makes checkpoints, adapters and what transformers says of them, once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tf.AutoTokenizer.from_pretrained(PYLM)

    def checkpoint(self, name: str) -> Path:
        path = self.folder / name
        if (path / "config.json").is_file():
            return path
        if name in PYLMS:
            text = (ROOT / "hf_sparselr" / "cli.py").read_text(encoding="utf-8")
            ids = torch.tensor(self.tokenizer(text)["input_ids"][:256]).view(4, 64)
            compress(PYLM, SparseLRConfig(**SETTINGS, **PYLMS[name], calibration=ids), output_dir=path)
            self.tokenizer.save_pretrained(path)
        else:
            cls, config, changes = FAMILIES[name]
            torch.manual_seed(0)
            model = cls._from_config(config(), dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():  # biases and norms too: zeros and ones hide errors
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            ids = torch.randint(3, 128, (4, 64))
            compress(model, SparseLRConfig(**{**SETTINGS, "rank": 8, **changes}, calibration=ids)).save_pretrained(path)
        return path

    def prompts(self, name: str) -> list[list[int]]:
        texts = ("def read_file(path):\n", "import os\nimport sys\n\nclass", "for i in range(10):")
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        return ids if name in PYLMS else [[token % 100 + 5 for token in prompt] for prompt in ids]

    def load(self, name: str) -> tf.PreTrainedModel:
        return tf.AutoModelForCausalLM.from_pretrained(self.checkpoint(name), dtype=torch.float32).eval()

    def adapter(self, name: str, replacing: bool = False) -> tuple[Path, torch.nn.Module]:
        from peft import LoraConfig, get_peft_model

        path, model = self.folder / f"{name}-{'replacing' if replacing else 'lora'}", self.load(name)
        torch.manual_seed(1)
        if replacing:
            adapted = hf_sparselr.as_peft_model(model)
        else:
            config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)
            adapted = get_peft_model(model, config)
        adapted.save_pretrained(path)
        return path, adapted.eval()


# --- the runs


def run_prompts(workshop: Workshop, name: str) -> str:
    checkpoint, options, with_adapter = RUNS[name]
    path, prompts = workshop.checkpoint(checkpoint), workshop.prompts(checkpoint)
    expected, adapters = reference(workshop.load(checkpoint), prompts), [None]
    if with_adapter:
        adapter, adapted = workshop.adapter(checkpoint)
        expected += reference(adapted, prompts)
        adapters.append(adapter)
        options = {**options, "enable_lora": True}
    # vLLM gives each rank on the CPU a NUMA node of its own, unless it is told which cores to take.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "tensor_parallel_size" in options else {}
    answer = ask(workshop.folder, path, prompts, options, adapters, **binding)
    check_served(answer)
    assert "hf_sparselr could not register" not in answer["log"]
    return f"{compare(answer['results'], expected):.1e}, started in {answer['seconds']:.0f} s"


def run_portable(workshop: Workshop) -> str:
    """The dense base and the plain LoRA of `export_portable`, in a vLLM without this package's plugin."""
    model, prompts = workshop.load("2of4"), workshop.prompts("2of4")
    base, adapter = hf_sparselr.export_portable(model, workshop.folder / "portable")
    options = {"enforce_eager": True, "enable_lora": True, "max_lora_rank": 16}
    plain = {"VLLM_PLUGINS": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    answer = ask(workshop.folder, base, prompts, options, [adapter], **plain)
    check_served(answer)
    return f"{compare(answer['results'], reference(model, prompts)):.1e}"


def run_replacing_adapter(workshop: Workshop) -> str:
    """An adapter that stands for the factors would be added to them: vLLM must refuse it."""
    adapter, _ = workshop.adapter("2of4", replacing=True)
    options = {"enforce_eager": True, "enable_lora": True}
    answer = ask(workshop.folder, workshop.checkpoint("2of4"), workshop.prompts("2of4"), options, [adapter])
    assert "init_lora_weights='sparselr'" in str(answer["error"]) + answer["log"], answer["error"]
    return "refused"


def run_errors(workshop: Workshop) -> str:
    """A bad checkpoint ends in the front end with its own message, before an engine starts."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = workshop.folder / "bad"
    source = workshop.checkpoint("2of4")
    path.mkdir(exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    with safe_open(source / "model.safetensors", "pt") as reader:
        metadata = reader.metadata()
    config = json.loads((source / "config.json").read_text())
    lost = "model.layers.1.mlp.up_proj.values"
    newer = json.loads(json.dumps(config))
    newer["quantization_config"]["format_version"] = 99
    for stored, left, message in (
        (config, {k: v for k, v in tensors.items() if k != lost}, f"tensor {lost} is missing"),
        (newer, tensors, "format_version=99: "),
    ):
        (path / "config.json").write_text(json.dumps(stored))
        save_file(left, path / "model.safetensors", metadata=metadata)
        answer = ask(workshop.folder, path, workshop.prompts("2of4"), {"enforce_eager": True})
        assert message in str(answer["error"]), answer["error"]
        assert "EngineCore" not in answer["log"], answer["log"]
    return "refused"


@contextlib.contextmanager
def server(model: Path, *flags: str):
    """`vllm serve` on loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", COMMAND, "serve", str(model), "--host", "127.0.0.1", "--port"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, str(port), *flags], env=ENVIRONMENT, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/health")
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read()[-6000:])
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait()


def run_server(workshop: Workshop) -> str:
    """`vllm serve DIR` answers over HTTP; in FP32 to compare, else without a flag."""
    path, text = workshop.checkpoint("2of4"), "def read_file(path):\n"
    expected = reference(workshop.load("2of4"), [workshop.tokenizer(text)["input_ids"]])[0]
    with server(path, "--dtype", "float32") as address:
        request = {"model": str(path), "prompt": text, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
        body = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        choice = json.load(urllib.request.urlopen(body))["choices"][0]
    assert choice["text"] == workshop.tokenizer.decode(expected["tokens"]), choice
    found = {"tokens": expected["tokens"], "logprobs": choice["logprobs"]["token_logprobs"]}
    return f"{compare([found], [expected]):.1e}"


OTHERS = {
    "portable": run_portable,
    "replacing-adapter": run_replacing_adapter,
    "errors": run_errors,
    "server": run_server,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help=f"of {', '.join([*RUNS, *OTHERS])}; all if none is named")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine_main(arguments.engine)
        return
    if unknown := sorted(set(arguments.runs) - {*RUNS, *OTHERS}):
        parser.error(f"unknown runs {', '.join(unknown)}: expected {', '.join([*RUNS, *OTHERS])}")
    torch.set_num_threads(1)  # the models are tiny
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for name in arguments.runs or [*RUNS, *OTHERS]:
            started = time.time()
            said = OTHERS[name](workshop) if name in OTHERS else run_prompts(workshop, name)
            print(f"{name}: {said} ({time.time() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
