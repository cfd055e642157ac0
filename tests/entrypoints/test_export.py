"""The portable pair: loaded by transformers and PEFT in a process that cannot import this package."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.peft_models import layers_of
from helpers.subprocesses import check
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import hf_sparselr
from hf_sparselr import SparseLRLinear, compress

CODE = """
import sys
sys.modules["hf_sparselr"] = None  # importing it raises ImportError
import torch, transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

def same(model, ids, expected):
    assert not any("SparseLR" in type(module).__name__ for module in model.modules())
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, expected, atol=1e-5, rtol=1e-5)

saved = torch.load("saved.pt")
for name, (cls, ids, expected) in saved.items():
    base = getattr(transformers, cls).from_pretrained(f"{name}/base")
    same(PeftModel.from_pretrained(base, f"{name}/adapter"), ids, expected)
for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
    same(loader.from_pretrained("llama/adapter"), *saved["llama"][1:])
assert sys.modules["hf_sparselr"] is None
"""
OVERRIDES = {"q_proj": {"rank": 2}, "up_proj": {"rank": 0}}


def test_the_pair_gives_the_same_logits_without_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = {}
    for name, overrides in {
        "llama": OVERRIDES,
        "llama-tied": {},
        "gpt2": {"c_attn": {"rank": 2}},
        "t5": {},
    }.items():
        model = compress(tiny.build(name), tiny.settings(overrides=overrides))
        before, model.generation_config.max_new_tokens = tiny.snapshot(model), 7
        assert hf_sparselr.export_portable(model, name) == (Path(name, "base"), Path(name, "adapter"))
        assert tiny.same(tiny.snapshot(model), before)
        assert json.loads(Path(name, "base", "generation_config.json").read_text())["max_new_tokens"] == 7
        config = json.loads(Path(name, "adapter", "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] == (name == "gpt2")  # whose weights are (in, out)
        saved[name] = (type(model).__name__, tiny.IDS, tiny.logits(model))
    torch.save(saved, "saved.pt")
    check(CODE, cwd=tmp_path, torch_imported=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model = compress(tiny.build("llama", torch.bfloat16), tiny.settings(overrides=OVERRIDES))
    folder = tmp_path_factory.mktemp("pair")
    hf_sparselr.export_portable(model, folder, base_name="me/base")
    return model, folder


def test_the_base_is_s_with_its_zeros(pair):
    model, folder = pair
    state = load_file(folder / "base" / "model.safetensors")
    for name, layer in layers_of(model, SparseLRLinear).items():
        weight = state[f"model.{name}.weight"]
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight[weight != 0], layer.values[layer.values != 0])
        assert (weight.reshape(-1, 4) != 0).sum(-1).max() <= 2
    assert "quantization_config" not in json.loads((folder / "base" / "config.json").read_text())
    assert not any(name.rpartition(".")[2] in ("mask", "values", "A", "B") for name in state)


def test_the_adapter_keeps_to_what_serving_software_takes(pair):
    model, folder = pair
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4
    assert config["alpha_pattern"] == config["rank_pattern"] != {}
    assert (config["use_dora"], config["use_rslora"], config["bias"]) == (False, False, "none")
    assert (config["modules_to_save"], config["init_lora_weights"]) == (None, True)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("me/base", "CAUSAL_LM")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * (14 - 2)
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], model.get_submodule(name).A)
    assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], model.get_submodule(name).B)


def test_a_fine_tuned_model_is_exported_after_merging(tmp_path):
    model = compress(tiny.build("llama"), tiny.settings())
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).eval()
    expected = tiny.logits(adapted)
    with pytest.raises(TypeError, match=r"PeftModel.*merge_and_unload"):
        hf_sparselr.export_portable(adapted, tmp_path)
    with pytest.raises(ValueError, match="has adapters"):
        hf_sparselr.export_portable(adapted.get_base_model(), tmp_path)
    base, adapter = hf_sparselr.export_portable(adapted.merge_and_unload(), tmp_path)
    dense = tiny.tf.AutoModelForCausalLM.from_pretrained(base)
    found = tiny.logits(PeftModel.from_pretrained(dense, adapter).eval())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_models_without_factors_are_refused(tmp_path):
    for model in (tiny.build("llama"), compress(tiny.build("llama"), tiny.settings(rank=0))):
        with pytest.raises(ValueError, match="no compressed layer with low-rank factors"):
            hf_sparselr.export_portable(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_in_memory_are_refused(tmp_path):
    compress(tiny.build("llama"), tiny.settings()).save_pretrained(tmp_path / "packed")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    places |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
    model = tiny.tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=places, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj is not in memory"):
        hf_sparselr.export_portable(model, tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
