"""The whole life of a compressed model in three minutes on a laptop, without a network.

Compresses the embedded language model of Python source while it loads (2:4 plus rank 16, 3BASiL-TM, calibrated on
the standard library of the Python that runs this), saves and reloads it packed, fine-tunes its factors through
PEFT with a Trainer, and prints perplexity on modules held out from training, and bytes on disk.

    python examples/quickstart.py [--output DIR]
"""

import argparse
import random
import sysconfig
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_sparselr

MODEL = Path(__file__).parent / "pylm-4m"
LIBRARY = Path(sysconfig.get_path("stdlib"))
HELD_OUT = "argparse shutil statistics textwrap csv heapq dataclasses zipfile pathlib tarfile".split()
HELD_OUT_PACKAGES = "logging asyncio email sqlite3 wsgiref".split()
LENGTH = 512
# Models are stored in BF16. A CPU without instructions for it runs dense layers several times as fast in FP32.
NATIVE = torch.cuda.is_available() or hf_sparselr.multiplies_natively(torch.bfloat16)
DTYPE = torch.bfloat16 if NATIVE else torch.float32


def read(held_out: bool) -> list[str]:
    """The library's source files, those held out from the model's training or the others."""
    files = sorted([*LIBRARY.glob("*.py"), *LIBRARY.glob("[a-z]*/*.py")])
    texts = []
    for file in files:
        parts = file.relative_to(LIBRARY).parts
        if parts[0] in ("site-packages", "test", "idlelib", "lib2to3"):
            continue
        name = file.stem if len(parts) == 1 else parts[0]
        if held_out == (name in (*HELD_OUT, *HELD_OUT_PACKAGES)):
            texts.append(file.read_text(encoding="utf-8", errors="ignore"))
    return texts


def windows(texts: list[str], tokenizer, count: int, seed: int) -> list[torch.Tensor]:
    """Non-overlapping windows of LENGTH tokens, in random order."""
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    cut = list(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))
    return random.Random(seed).sample(cut, count)


def fine_tune(model, samples: list[torch.Tensor], folder: Path):
    """Trains the model's own factors as a LoRA adapter."""
    peft_model = get_peft_model(model, hf_sparselr.lora_config(model))
    peft_model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        logging_steps=8,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in samples]
    Trainer(model=peft_model, args=arguments, train_dataset=data).train()
    return peft_model


def bytes_of(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="keep checkpoint, adapter and plot here")
    output = parser.parse_args().output or Path(tempfile.mkdtemp(prefix="sparselr-"))
    packed, adapter = output / "compressed", output / "adapter"

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    test = torch.stack(windows(read(held_out=True), tokenizer, 96, seed=0))
    rows = [("model", "perplexity", "bytes", "share")]

    def show(label: str, model, size: int) -> None:
        value = hf_sparselr.perplexity(model, test)
        rows.append((label, f"{value:.3f}", f"{size:,}", f"{size / bytes_of(MODEL):.3f}"))
        print("  ".join(rows[-1]), flush=True)

    show("dense", AutoModelForCausalLM.from_pretrained(MODEL, dtype=DTYPE), bytes_of(MODEL))

    config = hf_sparselr.SparseLRConfig(
        sparsity="2:4",
        rank=16,
        calibration=read(held_out=False),
        tokenizer=tokenizer,
        num_samples=48,
        seq_len=LENGTH,
        tm={"passes": 5},
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
    model.save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    print(model.sparselr_report)
    if not NATIVE:  # a cast to BF16 would also round the frequencies of rotary embeddings
        model.float()
    show("compressed", model, bytes_of(packed))

    model = AutoModelForCausalLM.from_pretrained(packed, dtype=DTYPE)
    show("reloaded", model, bytes_of(packed))

    tuned = fine_tune(model, windows(read(held_out=False), tokenizer, 192, seed=1), output / "trainer")
    tuned.save_pretrained(adapter)
    show("fine-tuned", tuned, bytes_of(packed, adapter))

    print(f"\n{hf_sparselr.format_table(rows)}\n\ncheckpoint and adapter: {output}")
    try:
        report = AutoModelForCausalLM.from_pretrained(packed).sparselr_report
        print(f"per-layer error: {hf_sparselr.plot_report(report, output)}")
    except ImportError:
        print("per-layer error plot: install the `plot` extra")


if __name__ == "__main__":
    main()
