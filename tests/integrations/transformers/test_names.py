"""Models whose tensors transformers fuses on saving to restore their original names."""

import pytest
import torch
import transformers as tf
from helpers import tiny
from safetensors import safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from hf_sparselr import compress
from hf_sparselr.integrations.transformers.names import needs_own_names
from hf_sparselr.nn.linear import packed_layers

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 128,
    "pad_token_id": 0,
}
FUSED = ("NomicBertModel", "NomicBertForMaskedLM", "GteModel", "JinaEmbeddingsV3Model")


def build(name: str):
    if not hasattr(tf, name):
        pytest.skip(f"this transformers has no {name}")
    cls = getattr(tf, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**SIZES)).eval()


def names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        return set(reader.keys())


@pytest.mark.parametrize("overrides", [{}, {"k_proj": {"skip": True}}], ids=["all", "k_proj dense"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_names_reload_to_the_bit(name, overrides, tmp_path):
    dense = build(name)
    dense.save_pretrained(tmp_path / "dense")
    if not any("qkv" in stored.lower() for stored in names(tmp_path / "dense")):
        pytest.skip("this transformers does not fuse its tensors")
    config = tiny.settings(overrides=overrides, on_incompatible="skip")
    for source in (dense, tmp_path / "dense"):  # made in memory, and loaded from original names
        model = compress(source, config)
        assert needs_own_names(model, packed_layers(model))
        model.save_pretrained(tmp_path / "packed")
        again = type(dense).from_pretrained(tmp_path / "packed")
        assert tiny.same(tiny.snapshot(again), tiny.snapshot(model))
        again.save_pretrained(tmp_path / "second", max_shard_size="60KB")
        second = type(dense).from_pretrained(tmp_path / "second")
        assert tiny.same(tiny.snapshot(second), tiny.snapshot(model))
        assert torch.equal(tiny.logits(second), tiny.logits(model))


def test_models_without_fused_names_keep_their_original_names(tmp_path):
    model = compress(tiny.build("neox"), tiny.settings())
    assert not needs_own_names(model, packed_layers(model))
    tiny.build("neox").save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "packed")
    assert names(tmp_path / "dense") <= names(tmp_path / "packed")


class Renamed(tf.LlamaForCausalLM):
    """Original names lack `mlp.`, which transformers puts before every `down_proj.`, also where it already stands."""


register_checkpoint_conversion_mapping(
    "Renamed",
    [
        WeightRenaming("down_proj.", "mlp.down_proj."),
        WeightConverter("qkv.weight", ["q_proj.weight", "k_proj.weight", "v_proj.weight"], [Chunk(dim=0)]),
    ],
    overwrite=True,
)


def test_own_names_are_not_renamed_and_a_dense_model_gets_its_original_ones(tmp_path):
    torch.manual_seed(0)
    dense = Renamed(tf.LlamaConfig(**SIZES)).eval()
    dense.save_pretrained(tmp_path / "dense")
    assert "model.layers.0.down_proj.weight" in names(tmp_path / "dense")
    model = compress(Renamed.from_pretrained(tmp_path / "dense"), tiny.settings())
    model.save_pretrained(tmp_path / "packed")
    assert "model.layers.0.mlp.down_proj.A" in names(tmp_path / "packed")
    again = Renamed.from_pretrained(tmp_path / "packed")
    assert tiny.same(tiny.snapshot(again), tiny.snapshot(model))
    again.dequantize().save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "dense")


def test_names_that_tear_a_layer_apart_are_not_restored(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 2, "tubelet_size": 2}
    config = tf.VideoMAEConfig(
        **sizes, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = tf.VideoMAEModel(config).eval()
    samples = [{"pixel_values": torch.randn(1, 2, 3, 16, 16)} for _ in range(4)]
    compress(model, tiny.settings(calibration=samples), tmp_path)
    assert "encoder.layer.0.attention.attention.query.bias" in names(tmp_path)  # originally q_bias, beside the layer
    again = tf.VideoMAEModel.from_pretrained(tmp_path)
    assert tiny.same(tiny.snapshot(again), tiny.snapshot(model))
