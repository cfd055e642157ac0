"""Compress one model in several ways and measure perplexity: the runs behind the tables in the README.

    python examples/reproduce.py MODEL --tokens TOKENS.safetensors --sparsity 2:4 0.5 0.7 --rank 16 --refine none tm

TOKENS holds `calibration` (windows x length token ids) and any number of other 2-D token tensors, each an
evaluation set. Models are compressed, saved, reloaded in FP32 and scored, every window on its next tokens.
"""

import argparse
import json
import tempfile
import time

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_sparselr
from hf_sparselr.evaluate import perplexity
from hf_sparselr.report import table


def score(model, tokens: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: perplexity(model, ids.long()) for name, ids in tokens.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--sparsity", nargs="+", default=["2:4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--refine", nargs="+", default=["none", "tm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--solver", type=json.loads, default={}, help="JSON options of the layer solver")
    parser.add_argument("--dtype", default="auto", help="of the checkpoint that is written")
    parser.add_argument("--tm", type=json.loads, default={}, help="JSON options of transformer matching")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="append one JSON line a run to this file")
    args = parser.parse_args()
    logging.disable_progress_bar()

    tokens = load_file(args.tokens)
    calibration = tokens.pop("calibration").long()
    dense = score(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device), tokens
    )
    rows = [("sparsity", "refine", "seed", *tokens, *(f"gap {name}" for name in tokens), "seconds")]
    rows.append(("dense", "", "", *(f"{value:.3f}" for value in dense.values()), *("" for _ in tokens), ""))
    for sparsity in args.sparsity:
        for refine in args.refine:
            for seed in args.seeds:
                config = hf_sparselr.SparseLRConfig(
                    sparsity=sparsity if ":" in sparsity else float(sparsity),
                    rank=args.rank,
                    refine=None if refine == "none" else refine,
                    calibration=calibration,
                    num_samples=len(calibration),
                    seq_len=calibration.shape[1],
                    seed=seed,
                    solver=args.solver,
                    tm=args.tm,
                    device=args.device,
                )
                started = time.perf_counter()
                model = hf_sparselr.compress(args.model, config, dtype=args.dtype)
                seconds = time.perf_counter() - started
                with tempfile.TemporaryDirectory() as folder:
                    model.save_pretrained(folder)
                    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
                    result = score(loaded, tokens)
                gaps = [result[name] - dense[name] for name in tokens]
                rows.append(
                    (
                        sparsity,
                        refine,
                        str(seed),
                        *(f"{value:.3f}" for value in result.values()),
                        *(f"{gap:.3f}" for gap in gaps),
                        f"{seconds:.0f}",
                    )
                )
                print("  ".join(rows[-1]), flush=True)
                if args.json:
                    with open(args.json, "a") as file:
                        record = {"sparsity": sparsity, "refine": refine, "seed": seed, "seconds": seconds}
                        record.update(perplexity=result, dense=dense, sizes=model.sparselr_report.sizes)
                        file.write(json.dumps(record) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
