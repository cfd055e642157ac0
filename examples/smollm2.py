"""Compress SmolLM2-135M-Instruct and compare dense, compressed and reloaded: perplexity, bytes, answers.

    python examples/smollm2.py                                  # from the Hub, calibrated on C4
    python examples/smollm2.py --model DIR --calibration self   # a local copy, no data and no network needed
    python examples/smollm2.py --model DIR --tokens TOKENS.safetensors

`--tokens` names a file with `calibration` (windows x length token ids); its other tensors are evaluation sets.
Without it the evaluation text is `--eval` (a Hub data set id, "file:GLOB").
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparselr

PROMPT = "Explain in three sentences why the sky is blue."


def sparsity(text: str) -> str | float:
    return text if ":" in text else float(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--sparsity", type=sparsity, default="2:4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--refine", choices=["tm", "none"], default="tm")
    parser.add_argument("--calibration", default="allenai/c4")
    parser.add_argument("--tokens")
    parser.add_argument("--eval", default="Salesforce/wikitext:wikitext-2-raw-v1")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--output", help="keep the compressed checkpoint here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def answer(model, tokenizer, prompt: str) -> str:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    with torch.no_grad():
        ids = model.generate(**chat, max_new_tokens=120, do_sample=False)
    return tokenizer.decode(ids[0, chat["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tests = {"eval": args.eval}
    calibration = args.calibration
    if args.tokens:
        tests = {name: ids.long() for name, ids in load_file(args.tokens).items()}
        calibration = tests.pop("calibration")
    config = hf_sparselr.SparseLRConfig(
        sparsity=args.sparsity,
        rank=args.rank,
        refine=None if args.refine == "none" else args.refine,
        calibration=calibration,
        num_samples=args.num_samples,
        seq_len=args.seq_len,
        tokenizer=tokenizer,
        device=args.device,
    )
    rows = [("model", *(f"{name} perplexity" for name in tests), "bytes", "share")]
    answers, dense_bytes = {}, None

    def measure(label: str, model) -> None:
        nonlocal dense_bytes
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        dense_bytes = dense_bytes or size
        for parameter in model.parameters():  # scored in FP32: half precision blurs small differences
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        model.to(args.device)
        scores = [hf_sparselr.perplexity(model, data, tokenizer, seq_len=args.seq_len) for data in tests.values()]
        rows.append((label, *(f"{value:.2f}" for value in scores), f"{size:,}", f"{size / dense_bytes:.3f}"))
        answers[label] = answer(model, tokenizer, args.prompt)

    measure("dense", AutoModelForCausalLM.from_pretrained(args.model))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(args.output or folder)
        model = hf_sparselr.compress(args.model, config, output_dir=output)
        measure("compressed", model)
        measure("reloaded", AutoModelForCausalLM.from_pretrained(output))
        stored = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print()
    print(hf_sparselr.format_table(rows))
    print(f"bytes on disk: {stored:,}; compressed in {model.sparselr_report.seconds:.0f} s on {args.device}")
    for label, text in answers.items():
        print(f"\n--- {label}: {args.prompt}\n{text}")


if __name__ == "__main__":
    main()
