"""Which layers are packed, by config.json; and what is refused before weights are read."""

import json

import pytest
from helpers import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparselr import compress
from hf_sparselr.format.checkpoint import FormatError
from hf_sparselr.format.layer_names import compact_names
from hf_sparselr.integrations.serving.packed_names import PackedNames


def names(*layers):
    return PackedNames({"format_version": 1, "packed_layers": compact_names(layers)})


def test_merged_layers_are_found_by_their_parts():
    found = names("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.fused")
    merged = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    prefix = "model.layers.0.self_attn"
    assert found.packed(f"{prefix}.qkv_proj", merged) == [f"{prefix}.q_proj", f"{prefix}.v_proj"]
    assert found.packed("model.layers.0.mlp.fused", merged) == ["model.layers.0.mlp.fused"]
    assert found.packed("model.layers.1.self_attn.qkv_proj", merged) == []
    found.rename(lambda stored: [name.replace("model.", "language_model.") for name in stored])
    assert found.packed("language_model.layers.0.mlp.fused", merged)


def test_files_of_a_model_without_its_head_have_shorter_names():
    assert names("h.0.c_fc").packed("transformer.h.0.c_fc", {})
    assert not names("transformer.h.0.c_fc").packed("h.0.c_fc", {})


def test_packed_experts_and_heads_are_refused_by_name():
    found = names("model.layers.1.mlp.experts.0.up_proj", "lm_head")
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.experts\.0\.up_proj is packed.* FusedMoE .*dequantize"
    ):
        found.refuse_below("model.layers.1.mlp.experts", "FusedMoE")
    with pytest.raises(ValueError, match=r"^lm_head is packed"):
        found.refuse_below("lm_head", "ParallelLMHead")
    found.refuse_below("model.layers.0.mlp.experts", "FusedMoE")
    found.refuse_below("", "Embedding")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format_version": 2, "packed_layers": ["a"]}, "format_version=2: .*up to version 1; upgrade"),
        ({"packed_layers": ["a"]}, "format_version=None"),
        ({"format_version": 1}, "packed_layers=None: .*save it again"),
        ({"format_version": 1, "low_rank": "hss", "packed_layers": ["a"]}, "low_rank=.hss.: .*flat"),
    ],
)
def test_what_cannot_be_served_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        PackedNames(config)


# --- files


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in two files, and the names in its config."""
    compress(tiny.build("llama"), tiny.settings()).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    return tmp_path, PackedNames(config["quantization_config"])


def test_whole_files_pass(checkpoint):
    path, found = checkpoint
    found.check_files(path)
    assert len(found.names) == 14


def test_a_file_that_lacks_a_tensor(checkpoint):
    path, found = checkpoint
    lost = f"{found.stored[-1]}.values"
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            metadata = reader.metadata()
        save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file, metadata)
    with pytest.raises(FormatError, match=rf"tensor {lost} is missing"):
        found.check_files(path)


def test_a_truncated_file(checkpoint):
    path, found = checkpoint
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FormatError, match="not a complete safetensors file"):
        found.check_files(path)


def test_a_missing_file(checkpoint):
    path, found = checkpoint
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(FormatError, match=r"names, dtypes or shapes of tensors were changed"):
        found.check_files(path)
