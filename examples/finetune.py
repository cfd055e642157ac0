"""Fine-tune a compressed model through PEFT: its own factors B, A are the adapter.

    python examples/finetune.py me/Llama-3.2-1B-2of4-r64 --data Salesforce/wikitext:wikitext-2-raw-v1 --output DIR

Any causal language model compressed with hf_sparselr works, from the Hub or a directory.
"""

import argparse

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import hf_sparselr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--data", default="Salesforce/wikitext:wikitext-2-raw-v1", help="id or id:config, column `text`"
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    name, _, subset = args.data.partition(":")
    data = load_dataset(name, subset or None, split="train").filter(lambda row: row["text"].strip())
    data = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.length),
        batched=True,
        remove_columns=data.column_names,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
    model = get_peft_model(model, hf_sparselr.lora_config(model))
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            bf16=True,
            logging_steps=10,
            report_to=[],
        ),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
