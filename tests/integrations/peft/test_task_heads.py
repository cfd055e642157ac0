"""Adapters of classifiers: the head trains, is saved with the adapter, and comes back."""

import pytest
import torch
import transformers as tf
from helpers import tiny
from helpers.peft_models import pack_blocks
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification

import hf_sparselr
from hf_sparselr import compress
from hf_sparselr.entrypoints.train_mode import train_mode

IDS = tiny.IDS
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(scope="module", params=["llama", "bert-mlm"])
def packed(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / request.param
    compress(tiny.build(request.param), tiny.settings(), output_dir=path)
    return path


def load(folder, labels=3):
    torch.manual_seed(5)  # the new head is random
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)


def step(model, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_the_head_trains_and_comes_back_with_the_adapter(packed, tmp_path):
    model = load(packed)
    expected = logits(model.eval())
    adapted = hf_sparselr.as_peft_model(model)
    assert torch.equal(logits(adapted.eval()), expected)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    step(adapted)
    moved = changed(adapted, before)
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    head = "classifier" if "bert" in packed.name else "score"
    assert any(f"{head}.modules_to_save.default" in name for name in moved)
    trained = logits(adapted)
    assert not torch.allclose(trained, expected)
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(logits(adapted), expected)
    adapted.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(load(packed), tmp_path).eval()
    assert torch.equal(logits(fresh), trained)
    assert torch.equal(logits(fresh.merge_and_unload()), trained)


def test_the_auto_class_of_the_task_opens_the_adapter(packed, tmp_path):
    adapted = step(hf_sparselr.as_peft_model(load(packed)))
    adapted.save_pretrained(tmp_path)
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert torch.equal(logits(again), logits(adapted))


def test_modules_to_save_are_added_to(packed):
    config = hf_sparselr.lora_config(load(packed), modules_to_save=["norm", "score"])
    assert config.modules_to_save[:2] == ["norm", "score"]
    assert len(set(config.modules_to_save)) == len(config.modules_to_save)
    assert config.task_type == "SEQ_CLS"
    assert hf_sparselr.lora_config(load(packed), task_type="FEATURE_EXTRACTION").task_type == "FEATURE_EXTRACTION"


def test_a_second_adapter_has_the_same_modules(packed):
    adapted = hf_sparselr.as_peft_model(load(packed))
    first = adapted.peft_config["default"]
    second = hf_sparselr.lora_config(adapted)
    assert set(second.modules_to_save) <= set(first.modules_to_save)
    adapted.add_adapter("second", second)
    adapted.set_adapter("second")
    assert {n for n, p in adapted.named_parameters() if p.requires_grad and "modules_to_save.second" in n}


@pytest.mark.parametrize("mode", ["factors", "factors+norms"])
def test_train_mode_trains_and_saves_the_head(packed, tmp_path, mode):
    model = train_mode(load(packed), mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model)
    moved = changed(model, before)
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"}
    assert (head if "bert" in packed.name else {"score.weight"}) <= moved
    assert any(name.endswith(".A") for name in moved) and not any("mask" in name or "values" in name for name in moved)
    assert ({name for name in moved if "norm" in name.lower()} != set()) == (mode == "factors+norms")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path).eval()), logits(model))


def test_train_mode_around_an_adapter_keeps_its_head_trainable(packed):
    adapted = hf_sparselr.as_peft_model(load(packed))
    expected = {name for name, p in adapted.named_parameters() if p.requires_grad}
    train_mode(adapted)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == expected


def test_image_classifiers():
    """PEFT has no name for the task, and its classes for tasks pass token ids."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)
    model = pack_blocks(tf.ViTForImageClassification(config)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
    adapted = hf_sparselr.as_peft_model(model)
    with torch.no_grad():
        assert torch.equal(adapted(pixel_values=pixels).logits, expected)
    adapted(pixel_values=pixels, labels=torch.tensor([0, 2])).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("classifier.modules_to_save.default" in name for name in trained)
    assert any("lora_B" in name for name in trained)
