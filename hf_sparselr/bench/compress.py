"""Compresses blocks of a preset shape with seeded synthetic weights, and prints seconds and peak memory by phase.

    hf-sparselr bench compress --preset llama-3-8b --blocks 2 --sparsity 2:4 --rank 64 [--textbook] [--profile]
    hf-sparselr bench compress --preset llama-3-8b --blocks 2 --processes 1 2 4

The real pipeline runs on the real number of tokens. One more block is compressed first, as a warm-up, and not counted.
"solve" contains "factorisation", "ADMM" and "refit". With `--processes` each number of processes, one a GPU, compresses
the same model; the seconds of the whole model are extrapolated from the blocks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from ..compression.distributed import joined
from ..compression.report import table
from ..config.sparselr_config import SparseLRConfig
from ..entrypoints.compress import compress
from ..format.patterns import from_text
from ..utils.world import World
from .presets import PRESETS

VOCABULARY = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), default="llama-3-8b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--refine", choices=("none", "tm"), default="tm")
    parser.add_argument("--effort", choices=("fast", "default", "high", "published"), default="default")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="other fields of SparseLRConfig")
    parser.add_argument("--textbook", action="store_true", help="also solve the first block's layers as published")
    parser.add_argument("--profile", action="store_true", help="share and rate of the matrix products")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, nargs="+", metavar="N", help="numbers of processes to compare")
    parser.add_argument("--json", metavar="FILE")


def run(args: argparse.Namespace) -> None:
    transformers_logging.disable_progress_bar()
    if args.processes:
        _compare(args)
        return
    with joined(args.device) as world:
        _measure(args, world)


def _measure(args: argparse.Namespace, world: World) -> None:
    refine = None if args.refine == "none" else args.refine
    report = _compress(args, args.blocks + 1, refine=refine, effort=args.effort)
    if not world.first:
        return
    result: dict[str, Any] = {"settings": report.settings, "blocks": report.blocks, "layers": report.layers}
    print(_phases(report.blocks[1:]))
    print(_layers(report))
    if args.profile:
        result["profile"] = _profile(args)
        print(result["profile"]["text"])
    if args.textbook:
        textbook = _compress(args, 1, refine=None, effort="published")
        result["textbook"] = {"blocks": textbook.blocks, "layers": textbook.layers}
        print("as published (textbook form, FP32):")
        print(_layers(textbook))
        ours, theirs = (sum(r["seconds"] for r in rep.layers[: len(textbook.layers)]) for rep in (report, textbook))
        print(f"the layer solves are {theirs / ours:.1f} x faster than the textbook form")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


def _compare(args: argparse.Namespace) -> None:
    """Runs this command once for each number of processes, and prints the speed-ups."""
    results = {count: _with_processes(args, count) for count in args.processes}
    whole = PRESETS[args.preset]["num_hidden_layers"]
    rows = [("processes", "seconds a block", "solve", "TM", f"{whole} blocks", "times as fast", "peak GB", "objective")]
    first, *_ = results.values()
    for count, result in results.items():
        blocks = result["blocks"][1:]
        seconds = sum(block["seconds"] for block in blocks) / len(blocks)
        phases = [sum(block["phases"].get(name, 0) for block in blocks) / len(blocks) for name in ("solve", "TM")]
        total = result["blocks"][0]["seconds"] + seconds * (whole - 1)
        if count == args.processes[0]:
            reference = seconds
        peak = max((peak for block in blocks for peak in block["peaks"].values()), default=0)
        ratio = sum(r["objective"] / one["objective"] for r, one in zip(result["layers"], first["layers"], strict=True))
        rows.append(
            (
                str(count),
                *(f"{value:.2f}" for value in (seconds, *phases)),
                f"{total:.0f}",
                f"{reference / seconds:.2f}",
                f"{peak / 1e9:.2f}" if peak else "-",
                f"{ratio / len(result['layers']):.6f}",
            )
        )
    print(table(rows))
    print("objective: that of the layers relative to the first row's, mean; peak: of one GPU")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


def _with_processes(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """The JSON result of this command in so many processes."""
    options = {**vars(args), "set": json.dumps(args.set), "refine": args.refine}
    kept = ("preset", "blocks", "samples", "seq_len", "sparsity", "rank", "refine", "effort", "set", "device")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "result.json")
        given = [part for name in kept for part in (f"--{name.replace('_', '-')}", str(options[name]))]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        command = [sys.executable, *launcher, "-m", "hf_sparselr", "bench", "compress", *given, "--json", file]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(file).read_text(encoding="utf-8"))


def synthetic_model(preset: str, blocks: int, device: str, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """A model on the CPU with seeded random weights, which are drawn on `device` because that is faster.

    The spectrum of the embeddings decays, so that inputs are correlated like real ones.
    """
    shape = {**PRESETS[preset], "num_hidden_layers": blocks, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype)
    model.cpu()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        width = embedding.shape[1]
        spectrum = torch.arange(1, width + 1) ** -0.5
        rotation = torch.linalg.qr(torch.randn(width, width)).Q
        embedding.copy_((torch.randn(VOCABULARY, width) * spectrum) @ rotation * 0.1)
    return model.eval()


def _compress(args: argparse.Namespace, blocks: int, refine: str | None, effort: str) -> Any:
    tokens = torch.randint(VOCABULARY, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0))
    config = SparseLRConfig(
        sparsity=from_text(args.sparsity),
        rank=args.rank,
        refine=refine,
        effort=effort,
        calibration=tokens,
        num_samples=args.samples,
        seq_len=args.seq_len,
        device=args.device,
        **args.set,
    )
    return compress(synthetic_model(args.preset, blocks, args.device), config, distributed=True).sparselr_report


def _phases(blocks: list[dict]) -> str:
    """Mean seconds and highest memory over blocks."""
    rows = [("phase", "seconds a block", "peak GB")]
    for name in blocks[0]["phases"]:
        seconds = sum(block["phases"][name] for block in blocks) / len(blocks)
        peaks = [block["peaks"][name] for block in blocks if name in block["peaks"]]
        rows.append((name, f"{seconds:.2f}", f"{max(peaks) / 1e9:.2f}" if peaks else "-"))
    total = sum(block["seconds"] for block in blocks) / len(blocks)
    peak = max((peak for block in blocks for peak in block["peaks"].values()), default=0)
    rows.append(("whole block", f"{total:.2f}", f"{peak / 1e9:.2f}" if peak else "-"))
    for block in blocks:
        if block["tm"]:
            ratio = block["tm"]["loss_after"] / block["tm"]["loss_before"]
            rows.append((f"TM of {block['name']}: loss after / before", f"{ratio:.4f}", ""))
    return table(rows)


def _layers(report: Any) -> str:
    rows = [("layer", "shape", "iterations", "objective", "seconds")]
    for row in report.layers:
        shape = "x".join(map(str, row["shape"]))
        cells = (str(row["iterations"]), f"{row['objective']:.6g}", f"{row['seconds']:.3f}")
        rows.append((row["name"], shape, *cells))
    return table(rows)


def _profile(args: argparse.Namespace) -> dict[str, Any]:
    """The time of one block's matrix products on the device, and their rate beside that of one large product."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = args.device.startswith("cuda")
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    refine = None if args.refine == "none" else args.refine
    with profile(activities=kinds, with_flops=True) as trace:
        _compress(args, 1, refine=refine, effort=args.effort)
    events = trace.key_averages()

    def microseconds(event: Any) -> float:
        return event.self_device_time_total if on_cuda else event.self_cpu_time_total

    total = sum(map(microseconds, events))
    products = [event for event in events if event.flops]
    spent = sum(map(microseconds, products))
    rate = sum(event.flops for event in products) / max(spent, 1e-9) * 1e6
    rates = {name: _rate(args.device, name) for name in (("tf32", "bf16") if on_cuda else ("fp32",))}
    shown = ", ".join(f"{name} {value / 1e12:.0f}" for name, value in rates.items())
    text = (
        f"matrix products: {spent / total:.0%} of the device's time, at {rate / 1e12:.0f} TFLOP/s "
        f"(one large product: {shown} TFLOP/s)"
    )
    return {"share": spent / total, "flops_per_second": rate, "large_product": rates, "text": text}


def _rate(device: str, precision: str, size: int = 8192, repeats: int = 5) -> float:
    """FLOP/s of one large product."""
    from ..utils.phase_timer import PhaseTimer
    from ..utils.precision import arithmetic

    size = size if device.startswith("cuda") else 1024
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    phases = PhaseTimer(torch.device(device), memory=False)
    with arithmetic(left.device, precision):
        left @ right
        with phases("product"):
            for _ in range(repeats):
                left @ right
    return 2 * size**3 * repeats / phases.seconds["product"]
