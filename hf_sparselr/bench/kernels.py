"""Speed of compressed layers against the dense product, one layer at a time, with random weights.

    hf-sparselr bench kernels --shapes llama-3-8b 4096x4096 --rows 1 8 2048 --patterns 2:4 0.5 0.7 --rank 64

Both sides run in the same process. A time is the median of many calls; on a GPU, of replays of a CUDA graph with a
flushed L2 cache. "GB/s" counts the packed bytes (mask, values, factors). "of bound" is the time in which a device copy
moves as many bytes, divided by the time taken. "host us" is the time of an eager packed call on the host.
"""

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..compression.report import table
from ..config.hierarchy import HierarchyOptions
from ..format.bitmask import pack_mask
from ..format.hierarchy import FLOAT_PARTS, Hierarchy
from ..format.patterns import EMPTY, Pattern, from_text, parse
from ..nn.hierarchical import HierarchicalLowRank
from ..nn.linear import SparseLRLinear
from .presets import PRESETS

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["llama-3-8b"], help=f"OUTxIN, or one of {', '.join(PRESETS)}")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 2048, 8192], help="of the input")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5", "0.7"], help='"none": without S')
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--hierarchy",
        type=json.loads,
        metavar="JSON",
        help="with hierarchical low-rank parts, such as '{\"depth\": 4}' or '{\"ranks\": [64, 32, 16, 8]}'",
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")


def run(args: argparse.Namespace) -> None:
    shapes = list(dict.fromkeys(itertools.chain.from_iterable(map(_shapes, args.shapes))))
    patterns = [EMPTY if text == "none" else parse(from_text(text), "--patterns") for text in args.patterns]
    device = torch.device(args.device)
    rate = copy_rate(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: a copy moves {rate:,.0f} GB/s (read and written)")
    results = []
    for shape, pattern in itertools.product(shapes, patterns):
        if not pattern.fits(shape):
            continue
        layer = random_layer(shape, pattern, args.rank, _DTYPES[args.dtype], device, args.hierarchy)
        with torch.no_grad():
            results += [_compare(layer, str(pattern), rows, rate, args) for rows in args.rows]
        print(_table(results[-len(args.rows) :]), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"device": name, "copy_gb_s": rate, "rank": args.rank, "results": results}, file, indent=1)


def _shapes(text: str) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of a preset, or of "OUTxIN"."""
    if text in PRESETS:
        preset = PRESETS[text]
        hidden, inner = preset["hidden_size"], preset["intermediate_size"]
        narrow = hidden // preset["num_attention_heads"] * preset["num_key_value_heads"]
        return [(hidden, hidden), (narrow, hidden), (inner, hidden), (hidden, inner)]
    out, cross, inputs = text.partition("x")
    if not (cross and out.isdecimal() and inputs.isdecimal() and int(out) and int(inputs)):
        raise ValueError(f"--shapes={text!r}: expected OUTxIN, or one of {', '.join(PRESETS)}")
    return [(int(out), int(inputs))]


def random_layer(
    shape: tuple[int, int],
    pattern: Pattern,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    hierarchy: dict | None = None,
    seed: int = 0,
) -> SparseLRLinear:
    """A packed layer with weights of N(0, 1 / in), on `device`; `hierarchy`: options, or None for flat factors."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    mask = pattern.mask(randn(*shape))
    nonzeros = int(mask.sum())
    split = None if hierarchy is None else HierarchyOptions(**hierarchy).shape(shape, rank)
    layer = SparseLRLinear(shape[1], shape[0], nonzeros, 0 if split else rank, device=device, dtype=dtype)
    layer.mask.data = pack_mask(mask)
    layer.values.data = (randn(nonzeros) * shape[1] ** -0.5).to(dtype)
    if split is not None:
        sizes = (randn(*split.sizes[part]) * shape[1] ** -0.5 for part in FLOAT_PARTS)
        layer.hierarchy = HierarchicalLowRank.from_hierarchy(Hierarchy(split, *sizes), dtype)
    elif rank:
        layer.A.data = (randn(rank, shape[1]) * shape[1] ** -0.5).to(dtype)
        layer.B.data = (randn(shape[0], rank) * rank**-0.5).to(dtype)
    return layer


def copy_rate(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), device, 20) / 1e6


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a call."""
    if device.type == "cuda":
        from ..kernels.timing import milliseconds

        return milliseconds(call, device, repeats)
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def _compare(layer: SparseLRLinear, pattern: str, rows: int, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    device, out, ins = layer.values.device, layer.out_features, layer.in_features
    x = torch.randn(rows, ins, device=device, dtype=layer.values.dtype)
    dense = layer.to_dense()
    size = dense.weight.numel() * dense.weight.element_size()
    copies = 1 if device.type == "cuda" else min(64, -(-(2**27) // size))  # on the CPU: out of the caches
    weights = itertools.cycle([dense.weight.detach().clone() for _ in range(copies)])
    clones = [layer] if copies == 1 else [copy.deepcopy(layer) for _ in range(copies)]
    reference = x.double() @ dense.weight.detach().double().T if rows <= 16 else dense(x)
    error = float((layer(x) - reference).norm() / reference.norm())
    for clone in clones:
        clone(x)  # its tables are made on first use
    layers = itertools.cycle(clones)
    slow = milliseconds(lambda: F.linear(x, next(weights)), device, args.repeats)
    fast = milliseconds(lambda: next(layers)(x), device, args.repeats)
    stored = sum(p.numel() * p.element_size() for p in layer.parameters())
    result = {
        "shape": f"{out}x{ins}",
        "pattern": pattern,
        "rows": rows,
        "dense_ms": slow,
        "packed_ms": fast,
        "speedup": slow / fast,
        "packed_gb_s": stored / fast / 1e6,
        "of_bound": stored / rate / 1e6 / fast,
        "error": error,
    }
    if device.type == "cuda":
        result |= {"kernel": _chosen(layer, x), "host_us": _host_microseconds(layer, x)}
    return result


def _host_microseconds(layer: SparseLRLinear, x: torch.Tensor) -> float:
    from ..kernels.timing import host_milliseconds

    return 1e3 * host_milliseconds(lambda: layer(x), x.device)


def _chosen(layer: SparseLRLinear, x: torch.Tensor) -> str:
    from ..kernels.gpu import select

    return str(select(x, len(x), layer.packed_weight, "auto"))


def _table(results: list[dict[str, Any]]) -> str:
    head = ("shape", "pattern", "rows", "dense ms", "packed ms", "speed-up", "GB/s", "of bound", "error")
    lines = [(*head, "host us", "kernel")]
    for r in results:
        numbers = (f"{r['dense_ms']:.4f}", f"{r['packed_ms']:.4f}", f"{r['speedup']:.2f}")
        rates = (f"{r['packed_gb_s']:,.0f}", f"{r['of_bound']:.0%}", f"{r['error']:.1e}")
        host = f"{r['host_us']:.0f}" if "host_us" in r else ""
        lines.append((r["shape"], r["pattern"], str(r["rows"]), *numbers, *rates, host, r.get("kernel", "")))
    return table(lines)
