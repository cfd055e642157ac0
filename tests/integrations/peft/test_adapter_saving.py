"""Adapter files: saved, reloaded in every way that PEFT and transformers offer, pushed to the Hub."""

import json

import pytest
import torch
from helpers import tiny
from helpers.hub_server import HubServer, run_client
from helpers.peft_models import additive, compressed_model, dense_weights, disturb, logits
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_sparselr
from hf_sparselr import compress
from hf_sparselr.integrations.hub.model_card import is_generated


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed checkpoint, with layers of two ranks and of none."""
    path = tmp_path_factory.mktemp("packed")
    overrides = {"up_proj": {"rank": 2}, "q_proj": {"rank": 0}}
    compress(tiny.build("llama"), tiny.settings(overrides=overrides), output_dir=path)
    return path


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def adapters(model, kind: str) -> PeftModel:
    config = hf_sparselr.lora_config(model) if kind == "replacing" else additive(init_lora_weights=False)
    config.task_type = "CAUSAL_LM"
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    disturb(adapted)
    return adapted


@pytest.mark.parametrize("kind", ["replacing", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_load(kind, dtype, packed, tmp_path):
    adapted = adapters(load(packed, dtype=dtype), kind)
    expected, base = tiny.logits(adapted), tiny.logits(load(packed, dtype=dtype))
    assert not torch.equal(expected, base)
    options = {"autocast_adapter_dtype": False}
    with dense_weights() as built:
        adapted.save_pretrained(tmp_path)
        for loaded in (
            PeftModel.from_pretrained(load(packed, dtype=dtype), tmp_path, **options),
            PeftModel.from_pretrained(load(packed, dtype=dtype), tmp_path, low_cpu_mem_usage=True, **options),
        ):
            assert torch.equal(tiny.logits(loaded.eval()), expected)
            with loaded.disable_adapter():
                assert torch.equal(tiny.logits(loaded), base)
        with_adapter = load(packed, dtype=dtype)
        with_adapter.load_adapter(str(tmp_path))
        for loaded in (with_adapter, load(tmp_path, dtype=dtype)):
            assert torch.equal(tiny.logits(loaded), expected)
            loaded.disable_adapters()
            assert torch.equal(tiny.logits(loaded), base)
        auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()  # its adapter is in FP32
        tolerance = 0 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(tiny.logits(auto), expected, atol=tolerance, rtol=tolerance)
    assert not built


def test_files_are_standard(packed, tmp_path):
    adapters(load(packed), "replacing").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_lora_weights"], config["r"]) == ("LORA", "sparselr", 4)
    assert config["base_model_name_or_path"] == str(packed)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 12
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (2, 32)


def test_transformers_saves_a_loaded_adapter_again(packed, tmp_path):
    adapted = adapters(load(packed), "replacing")
    adapted.save_pretrained(tmp_path / "first")
    model = load(packed)
    model.load_adapter(str(tmp_path / "first"))
    model.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(load(packed), tmp_path / "second").eval()
    assert torch.equal(tiny.logits(loaded), tiny.logits(adapted))


def test_training_goes_on_from_a_saved_adapter(packed, tmp_path):
    adapters(load(packed), "replacing").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(packed), tmp_path, is_trainable=True)
    loaded(input_ids=tiny.IDS, labels=tiny.IDS).loss.backward()
    trained = {name for name, parameter in loaded.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * 12 and all("lora_" in name for name in trained)


@pytest.mark.filterwarnings("ignore:`path_initial_model_for_weight_conversion`")
def test_a_replacing_adapter_converts_to_an_additive_one(tmp_path):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    adapted.save_pretrained(tmp_path / "start")
    disturb(adapted)
    adapted.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = PeftModel.from_pretrained(compressed_model(), tmp_path / "lora").eval()
    assert loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(loaded), logits(adapted))


def test_an_adapter_of_another_compressed_model_is_refused(tmp_path):
    hf_sparselr.as_peft_model(compressed_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compressed model that it was made for"):
        PeftModel.from_pretrained(compressed_model(ranks={"v_proj": 8}), tmp_path)


@pytest.mark.parametrize("saved", ["before", "between", "never"])
def test_an_adapter_never_names_the_dense_model_as_its_base(saved, tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "dense")
    model = compress(tmp_path / "dense", tiny.settings())
    if saved == "before":
        model.save_pretrained(tmp_path / "packed")
    adapted = hf_sparselr.as_peft_model(model)
    if saved == "between":
        adapted.get_base_model().name_or_path = str(tmp_path / "packed")
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    expected = None if saved == "never" else str(tmp_path / "packed")
    assert config["base_model_name_or_path"] == expected
    assert card.data.base_model is None  # a path
    assert str(tmp_path) not in card.content and "None" not in card.content
    if saved == "before":
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(tiny.logits(loaded.eval()), tiny.logits(adapted.eval()))


# --- over HTTP

FIRST = """
import torch, transformers, hf_sparselr
from pathlib import Path
from peft import LoraConfig, get_peft_model

folder = Path({folder!r})
ids = torch.load(folder / "ids.pt")
def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits

model = hf_sparselr.compress(folder / "dense", hf_sparselr.SparseLRConfig(
    sparsity="2:4", rank=4, refine=None, calibration=ids, num_samples=4, seq_len=32
))
model.push_to_hub("me/packed")
adapted = hf_sparselr.as_peft_model(model)
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.add_(0.05 * torch.randn_like(parameter))
adapted.push_to_hub("me/replacing")
torch.save(logits(adapted), folder / "replacing.pt")
adapted.merge_and_unload().push_to_hub("me/merged")

model = transformers.AutoModelForCausalLM.from_pretrained("me/packed")
config = LoraConfig(target_modules="all-linear", r=3, init_lora_weights=False, task_type="CAUSAL_LM")
adapted = get_peft_model(model, config)
adapted.push_to_hub("me/additive")
torch.save(logits(adapted), folder / "additive.pt")
"""
SECOND = """
import torch, hf_sparselr
from pathlib import Path
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

folder = Path({folder!r})
ids = torch.load(folder / "ids.pt")
for loader, name, saved in (
    (AutoPeftModelForCausalLM, "replacing", "replacing"),
    (AutoModelForCausalLM, "replacing", "replacing"),
    (AutoModelForCausalLM, "merged", "replacing"),
    (AutoPeftModelForCausalLM, "additive", "additive"),
    (AutoModelForCausalLM, "additive", "additive"),
):
    model = loader.from_pretrained("me/" + name).eval()
    with torch.no_grad():
        print(torch.equal(model(input_ids=ids).logits, torch.load(folder / (saved + ".pt"))))
"""


def test_adapters_over_the_hub(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "dense")
    torch.save(tiny.IDS, tmp_path / "ids.pt")
    with HubServer() as hub:
        run_client(hub, tmp_path / "first", FIRST.format(folder=str(tmp_path)))
        out = run_client(hub, tmp_path / "second", SECOND.format(folder=str(tmp_path)))
    assert out.split() == ["True"] * 5
    for name in ("me/replacing", "me/additive"):
        files = hub.repos[name]
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/packed"
        card = ModelCard(files["README.md"].decode())
        assert (card.data.base_model, card.data.library_name) == ("me/packed", "peft")
        assert {"sparselr", "lora", "base_model:adapter:me/packed"} <= set(card.data.tags)
        assert card.text.count("[me/packed](https://huggingface.co/me/packed)") == 1
        assert "pip install hf_sparselr" in card.text
        assert not any(str(tmp_path).encode() in data for data in files.values())
    assert "quantization_config" in json.loads(hub.repos["me/merged"]["config.json"])
    assert is_generated(ModelCard(hub.repos["me/merged"]["README.md"].decode()))
