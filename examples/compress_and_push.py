"""Compress a model from the Hub and push the packed checkpoint with its card.

    python examples/compress_and_push.py meta-llama/Llama-3.2-1B --repo me/Llama-3.2-1B-2of4-r64

Needs `hf auth login`. The model stays on the CPU; one block at a time is worked on the GPU.
"""

import argparse
import logging

from transformers import AutoTokenizer

import hf_sparselr

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repo", required=True, help="where to push: USER/NAME")
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sparsity = args.sparsity if ":" in args.sparsity else float(args.sparsity)
    config = hf_sparselr.SparseLRConfig(sparsity=sparsity, rank=args.rank, tokenizer=tokenizer)
    model = hf_sparselr.compress(args.model, config)
    score = hf_sparselr.perplexity(model, WIKITEXT, tokenizer)
    model.sparselr_report.perplexity = {"compressed, WikiText-2": score}
    model.push_to_hub(args.repo)
    tokenizer.push_to_hub(args.repo)


if __name__ == "__main__":
    main()
