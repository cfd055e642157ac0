"""Generation and memory of a whole model, dense against packed, as users run it.

    hf-sparselr bench generate --preset llama-3-8b --sparsity 2:4 0.7 --batch 1 8 --mode eager compiled --prompt 128
    hf-sparselr bench generate --model DIR --dense NAME

With a preset both models have random weights of its shape; with --model the packed checkpoint is compared with the
dense one that --dense names. Mode "eager" has the cache of `generate` by default, "compiled" a static cache and CUDA
graphs. "first token" is the time until the first token of a prompt, "tok/s" the rate of all sequences of a batch after
it. Both models are in memory and take turns: each ratio is of medians of as many runs of either, at the same time.
`hf-sparselr bench host` measures the time that a call takes the host.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging as transformers_logging

from ..compression.linear_layers import weight_shape
from ..compression.model_structure import linear_layers
from ..compression.report import table
from ..format.decomposition import Decomposition
from ..format.patterns import from_text, parse
from ..nn.linear import SparseLRLinear
from ..nn.shared_input import link_shared_inputs
from .presets import PRESETS

MODES = ("eager", "compiled")
RUNS = 3  # of each model in a case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), default="llama-3-8b")
    parser.add_argument("--sparsity", nargs="+", default=["2:4", "0.5", "0.7"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--model", help="a packed checkpoint, instead of a preset")
    parser.add_argument("--dense", help="the dense model beside --model")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["compiled"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="sequences at a time")
    parser.add_argument("--prompt", nargs="+", type=int, default=[512], help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")


def run(args: argparse.Namespace) -> None:
    if bool(args.model) != bool(args.dense):
        raise ValueError("--model and --dense go together: a packed checkpoint and the dense model it was made from")
    transformers_logging.disable_progress_bar()
    builds: dict[str, Callable[[], nn.Module]] = {}
    if args.model:
        builds["packed"] = lambda: _loaded(args, args.model)
    else:
        for sparsity in args.sparsity:
            builds[sparsity] = lambda sparsity=sparsity: packed_model(args, sparsity)
    torch._dynamo.config.recompile_limit = 64  # every model and case is compiled by itself
    dense, results = _Runs(args, _first_model(args)), []
    for name, build in builds.items():
        results += _compare(args, dense, name, build)
        print(_table(results[-_cases(args) :]), flush=True)
    if len(builds) > 1:
        print(_table(results))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def _cases(args: argparse.Namespace) -> int:
    return len(args.mode) * len(args.batch) * len(args.prompt)


def _table(results: list[dict[str, Any]]) -> str:
    """A line for the dense model of each case, which is that of the first comparison, and one for each packed one."""
    head = ("mode", "batch", "prompt", "weights", "first token ms", "x", "tok/s", "x", "weights GB", "peak GB")
    lines: dict[tuple, list[tuple[str, ...]]] = {}
    for r in results:
        case, dense = (r["mode"], r["batch"], r["prompt"]), r["dense"]
        of_case = lines.setdefault(case, [_line(case, "dense", dense, dense)])
        of_case.append(_line(case, r["name"], r, dense))
    order = sorted(lines, key=lambda case: (MODES.index(case[0]), *case[1:]))
    return table([head, *(line for case in order for line in lines[case])])


def _line(case: tuple, name: str, r: dict[str, Any], dense: dict[str, Any]) -> tuple[str, ...]:
    first, rate = dense["first_token"] / r["first_token"], r["rate"] / dense["rate"]
    speed = f"{1e3 * r['first_token']:.1f}", f"{first:.2f}", f"{r['rate']:.1f}", f"{rate:.2f}"
    memory = f"{r['weights'] / 1e9:.2f}", f"{r['peak'] / 1e9:.2f}" if r["peak"] else "-"
    return *map(str, case), name, *speed, *memory


def _first_model(args: argparse.Namespace) -> nn.Module:
    return _loaded(args, args.dense) if args.dense else dense_model(args)


def dense_model(args: argparse.Namespace, **changes: int) -> nn.Module:
    """A preset's shape with random weights; `changes` of its config."""
    torch.manual_seed(0)
    config = LlamaConfig(**PRESETS[args.preset] | changes)
    with torch.device(args.device):
        return LlamaForCausalLM._from_config(config, dtype=getattr(torch, args.dtype)).eval()


def _loaded(args: argparse.Namespace, name: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype))
    return model.to(args.device).eval()


def packed_model(args: argparse.Namespace, sparsity: str, **changes: int) -> nn.Module:
    """The preset's model with every linear layer of its blocks replaced by a packed one of random support."""
    model = dense_model(args, **changes)
    pattern = parse(from_text(sparsity))
    for name, layer in linear_layers(model).items():
        out, width = weight_shape(layer)
        mask = pattern.mask(torch.rand(out, width, device=args.device))
        factors = (torch.randn(args.rank, width), torch.randn(out, args.rank)) if args.rank else (None, None)
        factors = tuple(None if f is None else f.to(args.device) * 0.01 for f in factors)
        parts = Decomposition(layer.weight.detach() * mask, mask, *factors)
        model.set_submodule(name, SparseLRLinear.from_decomposition(parts, dtype=layer.weight.dtype))
    link_shared_inputs(model)
    return model


@torch.no_grad()  # as `generate` does
def _compare(
    args: argparse.Namespace, dense: "_Runs", name: str, build: Callable[[], nn.Module]
) -> list[dict[str, Any]]:
    """All modes, batches and prompts of one packed model, which is gone afterwards."""
    packed, results = _Runs(args, build()), []
    for case in itertools.product(args.mode, args.batch, args.prompt):
        runs = dense.of(*case), packed.of(*case)
        for _ in range(RUNS):
            for run in runs:
                run.measure()
        of_dense, of_packed = (run.result() for run in runs)
        results.append(
            {"name": name, **dict(zip(("mode", "batch", "prompt"), case, strict=True)), **of_packed, "dense": of_dense}
        )
    return results


class _Runs:
    """A model with what was compiled for it."""

    def __init__(self, args: argparse.Namespace, model: nn.Module) -> None:
        self._args, self._model, self._kept = args, model.requires_grad_(False), {}

    def of(self, *case: Any) -> "_Run":
        """Warm, for a mode, a batch and a prompt."""
        if case not in self._kept:
            self._kept[case] = _Run(self._args, self._model, *case)
            self._kept[case].warm_up()
        self._kept[case].times.clear()
        return self._kept[case]


class _Run:
    """Generation by one model in one case."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, mode: str, batch: int, prompt: int) -> None:
        self._model, self._mode, self._tokens, self._on_cuda = model, mode, args.tokens, args.device.startswith("cuda")
        self._ids = torch.randint(model.config.vocab_size, (batch, prompt), device=args.device)
        self._forward: Callable = model.forward
        if mode == "compiled":
            self._forward = torch.compile(
                model.forward, mode="reduce-overhead" if self._on_cuda else None, dynamic=False
            )
        self._static = StaticCache(config=model.config, max_cache_len=prompt + args.tokens + 1)
        self.times: list[tuple[float, float]] = []
        self._weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
        self._peak = 0

    def warm_up(self) -> None:
        """Compiles, records graphs, sees which layers share an input."""
        for _ in range(3):
            self._generate(min(8, self._tokens))

    def measure(self) -> None:
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - self._weights
        self.times.append(self._generate(self._tokens))
        if self._on_cuda:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated() - others)

    def result(self) -> dict[str, float]:
        """Seconds to the first token, tokens a second after it, bytes of weights, and peak bytes."""
        first, rest = (statistics.median(column) for column in zip(*self.times, strict=True))
        rate = len(self._ids) * self._tokens / rest
        return {"first_token": first, "rate": rate, "weights": self._weights, "peak": self._peak}

    def _generate(self, tokens: int) -> tuple[float, float]:
        """Seconds of the prompt, and of the tokens after the first."""
        cache, started = self._new_cache(), self._now()
        token = self._step(self._ids, cache, self._model.forward)
        first = self._now()
        for _ in range(tokens):
            token = self._step(token, cache, self._forward)
        return first - started, self._now() - first

    def _new_cache(self) -> DynamicCache | StaticCache:
        if self._mode == "eager":
            return DynamicCache(config=self._model.config)
        self._static.reset()
        return self._static

    @staticmethod
    def _step(ids: torch.Tensor, cache: Any, forward: Callable) -> torch.Tensor:
        logits = forward(input_ids=ids, past_key_values=cache, logits_to_keep=1, use_cache=True).logits
        return logits[:, -1:].argmax(-1).clone()  # a CUDA graph overwrites its outputs

    def _now(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
