"""Experts stored as 3-D parameters: unfused, compressed one by one, run packed."""

import re

import pytest
import torch
import transformers as tf
from helpers import tiny
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from hf_sparselr import compress
from hf_sparselr.nn.linear import packed_layers

GROUPED = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def dbrx():
    config = tf.DbrxConfig(
        vocab_size=tiny.VOCAB,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 64, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    )
    config.attn_config.rope_theta = 1e4
    return tf.DbrxForCausalLM, config


def gpt_oss():
    config = tf.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    return tf.GptOssForCausalLM, config


def build(name: str) -> tf.PreTrainedModel:
    if name in ("mixtral", "qwen3-moe"):
        return tiny.build(name)
    cls, config = MODELS[name]()
    torch.manual_seed(0)
    model = cls._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim != 2 or len(parameter) > 4:
                continue
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases of experts
    return model


def llama4():
    config = tf.Llama4TextConfig(
        **GROUPED, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1, moe_layers=[0, 1]
    )
    return tf.Llama4ForCausalLM, config


MODELS = {  # transposed, with biases and interleaved; in two dimensions; every expert is given all tokens
    "gpt_oss": gpt_oss,
    "dbrx": dbrx,
    "llama4": llama4,
}


NAMES = ["mixtral", "qwen3-moe", *MODELS]
LOOSE = {"on_incompatible": "skip"}  # routers are smaller than the rank


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_without_sparsity(name):
    model = build(name)
    dense = tiny.logits(model)
    compress(model, tiny.settings(sparsity=0.0, rank=0, **LOOSE))
    assert sum("experts" in layer for layer in packed_layers(model)) >= 2 * 2 * 4
    torch.testing.assert_close(tiny.logits(model), dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_stored_and_run_packed(name, tmp_path):
    model = compress(build(name), tiny.settings(**LOOSE), tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.logits(model), tiny.logits(again))
    assert packed_layers(again).keys() == packed_layers(model).keys()
    rows = [row for row in model.sparselr_report.layers if "tokens" in row]
    assert len(rows) == sum("experts" in layer for layer in packed_layers(model))
    stacks = {row["name"].rpartition(".")[0] for row in rows}
    for stack in stacks:  # every token is routed to as many experts
        tokens = sum(row["tokens"] for row in rows if row["name"].startswith(f"{stack}."))
        assert tokens == getattr(model.config, "num_experts_per_tok", 2) * tiny.IDS.numel()
    assert model.sparselr_report.coverage["packed"] > 0.9 * model.sparselr_report.coverage["total"]


def test_refinement_trains_experts():
    options = {
        "tm": {"passes": 3, "lr": 1e-3},
        "distill": {"passes": 1, "self_samples": 0, "precision": "fp32"},
    }
    plain = compress(build("mixtral"), tiny.settings())
    model = compress(build("mixtral"), tiny.settings(refine="tm+distill", **options))
    name = "model.layers.0.mlp.experts.down_proj.1"
    before, after = (each.get_submodule(name) for each in (plain, model))
    assert torch.equal(before.mask, after.mask) and not torch.equal(before.values, after.values)
    assert all(row["tm"]["loss_after"] < row["tm"]["loss_before"] for row in model.sparselr_report.blocks)


def test_ignored_experts_stay_as_they_are(tmp_path):
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    parameter = experts.gate_up_proj
    compress(model, tiny.settings(ignore=["experts"]), tmp_path)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == parameter.shape
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.logits(model), tiny.logits(again))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_dequantising_gives_back_the_parameters(name):
    model = build(name)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    compress(model, tiny.settings(**LOOSE))
    packed = tiny.logits(model)
    dense = model.dequantize()
    assert {key: tensor.shape for key, tensor in dense.state_dict().items()} == shapes
    torch.testing.assert_close(tiny.logits(dense), packed, atol=1e-5, rtol=1e-5)


def test_a_run_that_fails_leaves_experts_fused():
    model = build("mixtral")
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.model.layers[1].forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        compress(model, tiny.settings())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert model.model.layers[0].mlp.experts.config is model.config


def test_an_expert_without_tokens_is_compressed_by_the_mean(caplog):
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2] = 0
        model.model.layers[0].mlp.gate.weight[:2] = 100 * model.model.layers[0].mlp.gate.weight[:2].abs()
    compress(model, tiny.settings(calibration=tiny.IDS[:1, :4], num_samples=1))
    rows = [row for row in model.sparselr_report.layers if "experts" in row["name"]]
    assert any(row["tokens"] == 0 and row["share"] == 0 for row in rows)
    assert re.search(r"of 16 layers of experts saw few calibration tokens: model\S+ \(0, error 0\.\d+\)", caplog.text)
    assert "saw few calibration tokens" in str(model.sparselr_report)
    assert all(0 < row["relative_error"] < 1 for row in rows)


def test_experts_that_are_multiplied_otherwise_are_named(monkeypatch):
    def forward(self, x):
        x = x.view(self.num_experts, -1, self.hidden_size)
        gate, up = torch.einsum("eti,eio->eto", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("eti,eio->eto", up * self.act_fn(gate), self.down_proj).flatten(0, 1)

    monkeypatch.setattr(Llama4TextExperts, "forward", forward)
    with pytest.raises(ValueError, match=r"experts model\.layers\.0\..*one expert at a time.*ignore="):
        compress(build("llama4"), tiny.settings())
    model = compress(build("llama4"), tiny.settings(on_incompatible="skip"))
    assert not any(".experts." in name for name in packed_layers(model))
    assert any(".experts." in name for name in model.sparselr_report.dense)
    assert torch.isfinite(tiny.logits(model)).all()


def test_stacks_of_one_module_may_differ_in_length(tmp_path):
    """Experts that hand their tokens on have no second weight."""
    heads = {
        "num_attention_heads": 4,
        "head_dim": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "qk_head_dim": 16,
        "v_head_dim": 8,
    }
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "hidden_size": 32, "ffn_hidden_size": 64}
    experts = {"expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2}
    config = tf.LongcatFlashConfig(**heads, **ranks, **experts, vocab_size=tiny.VOCAB, num_layers=1, pad_token_id=0)
    torch.manual_seed(0)
    model = compress(tf.LongcatFlashForCausalLM(config).eval(), tiny.settings(**LOOSE), tmp_path)
    assert sum("down_proj." in name for name in packed_layers(model)) == 4
    again = tf.LongcatFlashForCausalLM.from_pretrained(tmp_path)
    assert tiny.same(tiny.snapshot(again), tiny.snapshot(model))
