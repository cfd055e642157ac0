"""Generation and memory of a whole model, dense against packed, as users run it.

    hf-sparselr bench generate --preset llama-3-8b --sparsity 2:4 0.7 --batch 1 8 --mode eager compiled --prompt 128
    hf-sparselr bench generate --model DIR --dense NAME

With a preset both models have random weights of its shape; with --model the packed checkpoint is compared with the
dense one that --dense names. Mode "eager" has the cache of `generate` by default, "compiled" a static cache and CUDA
graphs. "first token" is the time until the first token of a prompt (the median of three), "tok/s" the rate of all
sequences of a batch after it. `hf-sparselr bench host` measures the time that a call takes the host.
"""

import argparse
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
    builds: dict[str, Callable[[], nn.Module]] = {"dense": lambda: _dense(args)}
    if args.model:
        builds["packed"] = lambda: _loaded(args, args.model)
    else:
        for sparsity in args.sparsity:
            builds[sparsity] = lambda sparsity=sparsity: _packed(args, sparsity)
    results: list[dict[str, Any]] = []
    for name, build in builds.items():
        results += _measure_model(args, name, build)
    print(_table(results))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def _table(results: list[dict[str, Any]]) -> str:
    head = (
        "mode",
        "batch",
        "prompt",
        "weights",
        "first token ms",
        "x",
        "tok/s",
        "x",
        "weights GB",
        "peak GB",
    )
    lines, dense = [head], {}
    for r in results:
        case = r["mode"], r["batch"], r["prompt"]
        base = dense.setdefault(case, r)
        first, rate = base["first_token"] / r["first_token"], r["rate"] / base["rate"]
        speed = f"{1e3 * r['first_token']:.1f}", f"{first:.2f}", f"{r['rate']:.1f}", f"{rate:.2f}"
        memory = f"{r['weights'] / 1e9:.2f}", f"{r['peak'] / 1e9:.2f}" if r["peak"] else "-"
        lines.append((*map(str, case), r["name"], *speed, *memory))
    lines[1:] = sorted(lines[1:], key=lambda line: (MODES.index(line[0]), int(line[1]), int(line[2])))
    return table(lines)


def _dense(args: argparse.Namespace) -> nn.Module:
    if args.dense:
        return _loaded(args, args.dense)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**PRESETS[args.preset]), dtype=getattr(torch, args.dtype))
    return model.eval()


def _loaded(args: argparse.Namespace, name: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype))
    return model.to(args.device).eval()


def _packed(args: argparse.Namespace, sparsity: str) -> nn.Module:
    """The preset's model with every linear layer of its blocks replaced by a packed one of random support."""
    model = _dense(args)
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
def _measure_model(args: argparse.Namespace, name: str, build: Callable[[], nn.Module]) -> list[dict[str, Any]]:
    """All modes, batches and prompts of one model, which is gone afterwards."""
    model = build().requires_grad_(False)
    weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    results = []
    for mode in args.mode:
        torch._dynamo.reset()
        for batch in args.batch:
            for prompt in args.prompt:
                measured = _measure(args, model, mode, batch, prompt)
                results.append(
                    {
                        "name": name,
                        "mode": mode,
                        "batch": batch,
                        "prompt": prompt,
                        "weights": weights,
                        **measured,
                    }
                )
    return results


def _measure(args: argparse.Namespace, model: nn.Module, mode: str, batch: int, prompt: int) -> dict[str, float]:
    """Seconds to the first token, tokens a second after it, and peak bytes."""
    on_cuda = args.device.startswith("cuda")
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=args.device)
    forward: Callable = model.forward
    if mode == "compiled":
        forward = torch.compile(model.forward, mode="reduce-overhead" if on_cuda else None)
    static = StaticCache(config=model.config, max_cache_len=prompt + args.tokens + 1)

    def new_cache() -> DynamicCache | StaticCache:
        if mode == "eager":
            return DynamicCache(config=model.config)
        static.reset()
        return static

    def step(ids: torch.Tensor, cache: Any, forward: Callable) -> torch.Tensor:
        logits = forward(input_ids=ids, past_key_values=cache, logits_to_keep=1, use_cache=True).logits
        return logits[:, -1:].argmax(-1).clone()  # a CUDA graph overwrites its outputs

    def now() -> float:
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def generate(tokens: int) -> tuple[float, float]:
        """Seconds of the prompt, and of the tokens after the first."""
        cache, started = new_cache(), now()
        token = step(ids, cache, model.forward)
        first = now()
        for _ in range(tokens):
            token = step(token, cache, forward)
        return first - started, now() - first

    for _ in range(2):
        generate(min(8, args.tokens))  # compiles, records graphs, sees which layers share an input
    times = [generate(args.tokens) for _ in range(3)]
    first, rest = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "first_token": first,
        "rate": batch * args.tokens / rest,
        "peak": torch.cuda.max_memory_allocated() if on_cuda else 0,
    }
