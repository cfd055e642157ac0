"""Speed of the packed experts of a block against transformers' grouped product of dense ones, with random weights.

    hf-sparselr bench experts --presets mixtral-8x7b qwen3-30b-a3b --tokens 1 32 2048 --patterns 2:4 0.5 --rank 64

Both sides run the experts module of transformers on the same tokens, each routed to experts drawn at random. "ms" is
the time of the device: the median of replays of a CUDA graph with a flushed L2 cache; on a CPU, of calls. "host us" is
the time of an eager call on the host. "error" is that of the packed output against the dense one's.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ..compression.report import table
from ..format.patterns import Pattern, from_text, parse
from ..integrations.transformers.experts_forward import install
from ..nn.packed_experts import ExpertStack
from .kernels import milliseconds, random_layer

PRESETS = {  # experts, experts a token, hidden size, inner size of an expert
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
}

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--presets",
        nargs="+",
        default=list(PRESETS),
        help=f"{', '.join(PRESETS)}, or EXPERTSxTOP_KxHIDDENxINNER",
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 2048])
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    install()
    shapes = {text: _shape(text) for text in args.presets}
    patterns = [parse(from_text(text), "--patterns") for text in args.patterns]
    results: list[dict[str, Any]] = []
    for (name, shape), pattern in itertools.product(shapes.items(), patterns):
        packed, dense = random_experts(shape, pattern, args.rank, _DTYPES[args.dtype], torch.device(args.device))
        results += [_compare(name, shape, str(pattern), packed, dense, tokens, args) for tokens in args.tokens]
        print(_table(results[-len(args.tokens) :]), flush=True)
        del packed, dense
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"rank": args.rank, "results": results}, file, indent=1)


def _shape(text: str) -> tuple[int, ...]:
    if text in PRESETS:
        return PRESETS[text]
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--presets={text!r}: expected EXPERTSxTOP_KxHIDDENxINNER, or one of {', '.join(PRESETS)}")
    return tuple(map(int, sizes))


def random_experts(
    shape: tuple[int, ...], pattern: Pattern, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """Experts with packed random weights, and the same as transformers holds them."""
    experts, _, hidden, inner = shape
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        dense = MixtralExperts(config)
        packed = MixtralExperts(config)
    for name, parameter in list(dense.named_parameters()):
        size = parameter.shape[1:]
        layers = [random_layer(size, pattern, rank, dtype, device, seed=expert) for expert in range(experts)]
        weights = torch.empty(parameter.shape, dtype=dtype, device=device)
        for weight, layer in zip(weights, layers, strict=True):
            weight.copy_(layer.to_dense().weight)
        setattr(dense, name, nn.Parameter(weights, requires_grad=False))
        delattr(packed, name)
        setattr(packed, name, ExpertStack(layers, parameter.shape))
    return packed.eval(), dense.eval()


def _compare(
    name: str,
    shape: tuple[int, ...],
    pattern: str,
    packed: nn.Module,
    dense: nn.Module,
    tokens: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    experts, top, hidden, _ = shape
    device, dtype = torch.device(args.device), _DTYPES[args.dtype]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    index = torch.rand(tokens, experts, generator=generator).topk(top).indices.to(device)
    weights = torch.full((tokens, top), 1 / top, device=device, dtype=dtype)
    expected, actual = dense(x, index, weights).float(), packed(x, index, weights).float()
    result = {
        "experts": name,
        "pattern": pattern,
        "tokens": tokens,
        "error": float((actual - expected).norm() / expected.norm()),
    }
    for side, module in (("dense", dense), ("packed", packed)):
        result[f"{side}_ms"] = milliseconds(lambda module=module: module(x, index, weights), device, args.repeats)
        if device.type == "cuda":
            result[f"{side}_host_us"] = _host_microseconds(lambda module=module: module(x, index, weights), device)
    return result | {"speedup": result["dense_ms"] / result["packed_ms"]}


def _host_microseconds(call: Callable[[], Any], device: torch.device) -> float:
    from ..kernels.timing import host_milliseconds

    return 1e3 * host_milliseconds(call, device)


def _table(results: list[dict[str, Any]]) -> str:
    head = ("experts", "pattern", "tokens", "dense ms", "packed ms", "speed-up", "error", "dense host us", "host us")
    lines = [head]
    for r in results:
        times = (f"{r['dense_ms']:.4f}", f"{r['packed_ms']:.4f}", f"{r['speedup']:.2f}", f"{r['error']:.1e}")
        host = (f"{r[f'{side}_host_us']:.0f}" if f"{side}_host_us" in r else "" for side in ("dense", "packed"))
        lines.append((r["experts"], r["pattern"], str(r["tokens"]), *times, *host))
    return table(lines)
