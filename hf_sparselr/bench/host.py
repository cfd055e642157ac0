"""The time that a call of a layer takes the host, dense against packed, in a model.

    hf-sparselr bench host --preset llama-3-8b --blocks 32 --rows 1 8 32 128 --patterns 2:4 0.5

The linear layers of a preset's blocks are called one after the other, without the operations between them: the caches
of the processor are as cold as in a model. "us" is the time in which the host issues a call, however busy the device
is: the median of many passes over the number of layers. On a CPU it includes the product.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import nn

from ..compression.report import table
from ..format.patterns import from_text, parse
from ..nn.shared_input import link_shared_inputs
from .kernels import random_layer
from .presets import PRESETS

_LAYERS = 7  # of a block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), default="smollm2-135m")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128], help="of the input")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--inference-mode", action="store_true", help="instead of no_grad, which `generate` uses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")


def run(args: argparse.Namespace) -> None:
    with torch.inference_mode() if args.inference_mode else torch.no_grad():
        results = _measure(args)
    dense = {r["rows"]: r["us"] for r in results if r["weights"] == "dense"}
    lines = [("rows", "weights", "us a layer", "over dense")]
    for r in sorted(results, key=lambda r: r["rows"]):
        lines.append((str(r["rows"]), r["weights"], f"{r['us']:.1f}", f"{r['us'] / dense[r['rows']]:.2f}"))
    print(table(lines))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for weights in ("dense", *args.patterns):
        blocks = nn.ModuleList(_block(args, weights) for _ in range(args.blocks))
        link_shared_inputs(blocks)
        results += [{"rows": rows, "weights": weights, "us": _microseconds(args, blocks, rows)} for rows in args.rows]
        del blocks
    return results


def _block(args: argparse.Namespace, weights: str) -> nn.Module:
    preset, device = PRESETS[args.preset], torch.device(args.device)
    hidden, inner = preset["hidden_size"], preset["intermediate_size"]
    narrow = hidden // preset["num_attention_heads"] * preset["num_key_value_heads"]
    shapes = {
        "q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    block = nn.Module()
    for name, (out, ins) in shapes.items():
        if weights == "dense":
            layer: nn.Module = nn.Linear(ins, out, bias=False, device=device, dtype=torch.bfloat16)
        else:
            layer = random_layer((out, ins), parse(from_text(weights)), args.rank, torch.bfloat16, device)
        block.add_module(name, layer)
    return block


def _microseconds(args: argparse.Namespace, blocks: nn.ModuleList, rows: int) -> float:
    width = blocks[0].q.in_features
    x = torch.randn(rows, width, device=args.device, dtype=torch.bfloat16)
    times = []
    for number in range(args.passes + 3):
        if x.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        _pass(blocks, x)
        if number >= 3:  # kernels are chosen, groups are seen
            times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times) / (len(blocks) * _LAYERS)


def _pass(blocks: nn.ModuleList, x: torch.Tensor) -> None:
    for block in blocks:
        y = block.q(x)
        block.k(x), block.v(x)
        y = block.o(y)
        z = block.gate(y)
        block.up(y)
        x = block.down(z)
