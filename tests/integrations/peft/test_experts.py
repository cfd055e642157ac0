"""Adapters in models whose experts are 3-D parameters, and in models where PEFT refuses some layers."""

import copy

import peft
import pytest
import torch
import transformers as tf
from helpers import tiny
from helpers.peft_models import IDS, disturb, logits, lora_layers, pack_blocks
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

import hf_sparselr
from hf_sparselr.nn.linear import packed_layers

HEADS = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "pad_token_id": 0}


def mixed(layers: int = 2) -> tf.PreTrainedModel:
    """A dense first block, then blocks of experts and a shared expert; all 2-D layers are packed."""
    torch.manual_seed(0)
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = tf.DeepseekV3Config(
        **SIZES, **HEADS, **experts, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        moe_intermediate_size=64, first_k_dense_replace=1,
    )  # fmt: skip
    return pack_blocks(tf.DeepseekV3ForCausalLM(config)).eval()


def on_experts(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]


@pytest.mark.parametrize("layers", [2, 4])  # PEFT shortens lists of 20 names and more
def test_the_factors_beside_experts_are_the_adapter(tmp_path, layers):
    model = mixed(layers)
    expected, names = logits(model), set(packed_layers(model))
    adapted = hf_sparselr.as_peft_model(model).eval()
    assert torch.equal(logits(adapted), expected)
    assert {f"model.{name}" for name in lora_layers(adapted)} == names and not on_experts(adapted)
    disturb(adapted)
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixed(layers), tmp_path).eval()
    assert torch.equal(logits(again), trained) and not on_experts(again)


def test_full_names_select_compressed_layers_only():
    model = mixed()
    names = [name for name in packed_layers(model) if name.endswith("down_proj")]
    assert len(names) == 2
    adapted = get_peft_model(model, LoraConfig(target_modules=names))
    assert {f"model.{name}" for name in lora_layers(adapted)} == set(names) and not on_experts(adapted)
    adapted(input_ids=IDS, labels=IDS).loss.backward()


def test_a_bare_name_selects_the_experts_too():
    model = mixed()
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj", "o_proj"]))
    assert {name.rpartition(".")[2] for name in lora_layers(adapted)} == {"down_proj", "o_proj"}
    assert len(lora_layers(adapted)) == 4 and on_experts(adapted)
    adapted(input_ids=IDS, labels=IDS).loss.backward()


def test_a_bare_name_where_there_are_no_experts_left():
    """No parameter has the name that PEFT would target in the place of the layers."""
    model = mixed()
    del model.model.layers[1].mlp.experts
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    assert len(lora_layers(adapted)) == 2 and not adapted.peft_config["default"].target_parameters


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_the_layers_of_packed_experts(tmp_path, name):
    """PEFT cannot hold a stack of experts; a name that selects it selects its layers."""
    model = hf_sparselr.compress(tiny.build(name), tiny.settings())
    experts = {layer for layer in packed_layers(model) if ".experts.down_proj." in layer}
    assert len(experts) == 8
    twin = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj", "q_proj"]))
    found = {f"model.{layer}" for layer in lora_layers(adapted)}
    assert experts < found and len(found) == len(experts) + 2
    adapted(input_ids=tiny.IDS, labels=tiny.IDS).loss.backward()
    disturb(adapted)
    trained = tiny.logits(adapted.eval())
    adapted.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(twin, tmp_path).eval()), trained)


def test_a_start_from_factors_takes_no_parameters():
    model = mixed()
    with pytest.raises(ValueError, match=r"target_parameters=.*add an adapter of another peft\.LoraConfig"):
        hf_sparselr.as_peft_model(model, target_parameters=["experts.down_proj"])


def mamba() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "state_size": 4,
        "num_hidden_layers": 2,
        "time_step_rank": 4,
    }
    return pack_blocks(tf.MambaForCausalLM(tf.MambaConfig(**sizes))).eval()


def test_layers_that_peft_refuses_are_left_out_and_said(caplog):
    model = mamba()
    with pytest.raises(ValueError, match="incompatible"):  # PEFT's own rule
        peft.get_peft_model(mamba(), LoraConfig(target_modules=["out_proj"]))
    expected = logits(model)
    adapted = hf_sparselr.as_peft_model(model).eval()
    assert torch.equal(logits(adapted), expected)
    leaves = {name.rpartition(".")[2] for name in lora_layers(adapted)}
    assert leaves and "out_proj" not in leaves
    assert "out_proj" in caplog.text and "train_mode" in caplog.text


def test_a_model_of_nothing_but_such_layers():
    model = mamba()
    for name, layer in packed_layers(model).items():
        if not name.endswith("out_proj"):
            model.set_submodule(name, layer.to_dense())
    with pytest.raises(ValueError, match=r"PEFT refuses LoRA on all .*train_mode"):
        hf_sparselr.lora_config(model)
