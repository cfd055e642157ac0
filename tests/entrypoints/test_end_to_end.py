"""One real run on a trained model: compress on load, save, reload, fine-tune with a Trainer, reload the adapter."""

import sysconfig
from pathlib import Path

import pytest
import torch
from helpers.paths import PYLM as MODEL
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_sparselr
from hf_sparselr.entrypoints.perplexity import perplexity
from hf_sparselr.format.bitmask import unpack_mask
from hf_sparselr.format.patterns import parse
from hf_sparselr.nn.linear import packed_layers

LIBRARY = Path(sysconfig.get_path("stdlib"))
LENGTH = 128
FP32 = torch.float32  # BF16 is slow on a CPU without instructions for it
QUICK = {"rho": 0.1, "check_every": 3, "growth": (1.2, 1.1, 1.05), "min_iterations": 30, "max_iterations": 90}


def texts(*names: str) -> list[str]:
    return [(LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in names]


def test_compress_save_reload_and_fine_tune(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer("\n\n".join(texts("textwrap")))["input_ids"])
    held_out = ids[: 8 * LENGTH].view(8, LENGTH)
    dense = perplexity(AutoModelForCausalLM.from_pretrained(MODEL, dtype=FP32), held_out)
    config = hf_sparselr.SparseLRConfig(
        rank=8,
        calibration=texts("ast", "typing", "inspect"),
        tokenizer=tokenizer,
        num_samples=32,
        seq_len=LENGTH,
        method_options=QUICK,
        tm={"passes": 2},
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=FP32)
    compressed = perplexity(model, held_out)
    assert dense < compressed < 1.5 * dense
    assert all(row["tm"]["loss_after"] < row["tm"]["loss_before"] for row in model.sparselr_report.blocks)
    for layer in packed_layers(model).values():
        assert parse("2:4").allows(unpack_mask(layer.mask, layer.in_features))

    model.save_pretrained(tmp_path / "packed")
    stored, original = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (tmp_path / "packed", MODEL))
    assert stored < 0.75 * 2 * original  # which is in BF16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert perplexity(model, held_out) == compressed

    before = {name: (layer.mask.clone(), layer.values.clone()) for name, layer in packed_layers(model).items()}
    peft_model = get_peft_model(model, hf_sparselr.lora_config(model))
    assert perplexity(peft_model, held_out) == pytest.approx(compressed, rel=1e-3)
    train = torch.tensor(tokenizer("\n\n".join(texts("optparse", "ftplib")))["input_ids"])
    windows = train[: 64 * LENGTH].view(64, LENGTH)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        num_train_epochs=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(
        model=peft_model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in windows]
    ).train()
    tuned = perplexity(peft_model, held_out)
    assert tuned < compressed
    for name, layer in packed_layers(model).items():
        key = name.removesuffix(".base_layer")
        assert torch.equal(layer.mask, before[key][0])
        assert torch.equal(layer.values, before[key][1])

    peft_model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert perplexity(PeftModel.from_pretrained(base, tmp_path / "adapter"), held_out) == pytest.approx(tuned, rel=1e-6)
