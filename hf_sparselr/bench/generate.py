"""Prefill and decode rates and memory of a whole model, dense against packed.

    hf-sparselr bench generate --preset llama-3-8b --sparsity 2:4 0.7 --rank 64
    hf-sparselr bench generate --model DIR --dense NAME

With a preset both models have random weights of its shape; with --model the packed checkpoint is compared with the
dense one that --dense names. Both are compiled with a static cache, unless --eager.
"""

import argparse
import json
import time
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging as transformers_logging

from ..compression.linear_layers import weight_shape
from ..compression.model_structure import linear_layers
from ..compression.report import table
from ..format.decomposition import Decomposition
from ..format.patterns import from_text, parse
from ..nn.linear import SparseLRLinear
from ..nn.shared_input import link_shared_inputs
from .presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), default="llama-3-8b")
    parser.add_argument("--sparsity", nargs="+", default=["2:4", "0.5", "0.7"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--model", help="a packed checkpoint, instead of a preset")
    parser.add_argument("--dense", help="the dense model beside --model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")


def run(args: argparse.Namespace) -> None:
    if bool(args.model) != bool(args.dense):
        raise ValueError(
            "--model and --dense go together: a packed checkpoint and the dense model it was made from"
        )
    transformers_logging.disable_progress_bar()
    results = {"dense": _measure(args, lambda: _dense(args))}
    if args.model:
        results["packed"] = _measure(args, lambda: _loaded(args, args.model))
    else:
        for sparsity in args.sparsity:
            results[sparsity] = _measure(args, lambda sparsity=sparsity: _packed(args, sparsity))
    rows = [("weights", "prefill tok/s", "decode tok/s", "decode x", "weights GB", "weights x", "peak GB")]
    base = results["dense"]
    for name, result in results.items():
        rows.append(
            (
                name,
                f"{result['prefill']:.0f}",
                f"{result['decode']:.1f}",
                f"{result['decode'] / base['decode']:.2f}",
                f"{result['weights'] / 1e9:.2f}",
                f"{result['weights'] / base['weights']:.3f}",
                f"{result['peak'] / 1e9:.2f}" if result["peak"] else "-",
            )
        )
    print(table(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def _dense(args: argparse.Namespace) -> nn.Module:
    if args.dense:
        return _loaded(args, args.dense)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**PRESETS[args.preset]), dtype=getattr(torch, args.dtype)
        )
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
def _measure(args: argparse.Namespace, build: Any) -> dict[str, float]:
    on_cuda = args.device.startswith("cuda")
    model = build().requires_grad_(False)
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    ids = torch.randint(model.config.vocab_size, (1, args.prompt), device=args.device)
    cache = StaticCache(config=model.config, max_cache_len=args.prompt + args.tokens + 1)
    forward = (
        model.forward
        if args.eager
        else torch.compile(model.forward, mode="reduce-overhead" if on_cuda else None)
    )

    def step(ids: torch.Tensor, forward: Any) -> torch.Tensor:
        logits = forward(input_ids=ids, past_key_values=cache, logits_to_keep=1, use_cache=True).logits
        return logits[:, -1:].argmax(-1).clone()  # a CUDA graph overwrites its outputs

    def seconds(action: Any) -> float:
        if on_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def prefill() -> torch.Tensor:
        cache.reset()
        return step(ids, model.forward)

    def decode(token: torch.Tensor, count: int) -> None:
        for _ in range(count):
            token = step(token, forward)

    prefill()
    decode(prefill(), min(8, args.tokens))  # compiles, and records the graphs
    times = [(seconds(prefill), seconds(lambda: decode(ids[:, -1:], args.tokens))) for _ in range(3)]
    prefill_seconds, decode_seconds = (min(column) for column in zip(*times, strict=True))
    return {
        "prefill": args.prompt / prefill_seconds,
        "decode": args.tokens / decode_seconds,
        "weights": weights,
        "peak": torch.cuda.max_memory_allocated() if on_cuda else 0,
    }
