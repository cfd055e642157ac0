"""Evaluate a compressed model with EleutherAI's lm-evaluation-harness (the `eval` extra).

python examples/evaluate_lm_eval.py me/Llama-3.2-1B-2of4-r64 --tasks arc_easy piqa wikitext
"""

import argparse

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "piqa", "wikitext"])
    parser.add_argument("--batch-size", default="auto")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size), tasks=args.tasks
    )
    print(make_table(results))


if __name__ == "__main__":
    main()
