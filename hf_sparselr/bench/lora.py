"""The time of a training step of LoRA, dense against packed.

    hf-sparselr bench lora --preset llama-3-8b --blocks 1 --batch 4 --length 512 --sparsity 2:4 0.5

The models have random weights of a preset's shape, some of its blocks and a small vocabulary; all linear layers of the
blocks get an adapter, as `get_peft_model` makes it. A step is forward, backward and AdamW. The models take turns, and a
time is the median. "host" is the part of a step in which Python has not issued all of its work yet: where it is about
the whole step, the host decides.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ..compression.report import table
from .generate import dense_model, packed_model
from .presets import PRESETS

_VOCABULARY = 1024
_WARM_UP = 4  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), default="llama-3-8b")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--sparsity", nargs="+", default=["2:4", "0.5"])
    parser.add_argument("--rank", type=int, default=64, help="of the compressed layers")
    parser.add_argument("--adapter-rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=15, help="to measure, of each model")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")


def run(args: argparse.Namespace) -> None:
    changes = {"num_hidden_layers": args.blocks, "vocab_size": _VOCABULARY}
    models = {"dense": dense_model(args, **changes)}
    for sparsity in args.sparsity:
        models[sparsity] = packed_model(args, sparsity, **changes)
    training = {name: _Training(args, model) for name, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in training}
    for number in range(_WARM_UP + args.steps):
        for name, one in training.items():
            step = one.step()
            if number >= _WARM_UP:
                times[name].append(step)
    medians = {
        name: [statistics.median(column) for column in zip(*steps, strict=True)] for name, steps in times.items()
    }
    results = [
        {"weights": name, "step_ms": 1e3 * step, "host_ms": 1e3 * host} for name, (step, host) in medians.items()
    ]
    print(_table(results))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def _table(results: list[dict[str, Any]]) -> str:
    lines = [("weights", "step ms", "host ms", "time over dense")]
    for r in results:
        over = r["step_ms"] / results[0]["step_ms"]
        lines.append((r["weights"], f"{r['step_ms']:.2f}", f"{r['host_ms']:.2f}", f"{over:.2f}"))
    return table(lines)


class _Training:
    """A model with adapters, an optimizer and a batch."""

    def __init__(self, args: argparse.Namespace, model: nn.Module) -> None:
        rank = args.adapter_rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        self._model = get_peft_model(model.train(), config)
        self._optimizer = torch.optim.AdamW([p for p in self._model.parameters() if p.requires_grad], lr=1e-4)
        self._ids = torch.randint(_VOCABULARY, (args.batch, args.length), device=args.device)

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and until the host had issued all of it."""
        self._wait()
        started = time.perf_counter()
        self._model(input_ids=self._ids, labels=self._ids).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        issued = time.perf_counter()
        self._wait()
        return time.perf_counter() - started, issued - started

    def _wait(self) -> None:
        if self._ids.is_cuda:
            torch.cuda.synchronize()
