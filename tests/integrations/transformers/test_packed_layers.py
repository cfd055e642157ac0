"""config.json names the packed layers as the files do."""

import json

import pytest
from helpers import tiny
from transformers import AutoModel, AutoModelForCausalLM

from hf_sparselr import compress
from hf_sparselr.format.checkpoint import group_layers, read_headers
from hf_sparselr.format.layer_names import expand_names


def named(path):
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config["quantization_config"]["packed_layers"]


def check(path):
    stored = group_layers(read_headers(sorted(path.glob("*.safetensors"))))
    assert sorted(expand_names(named(path))) == sorted(stored)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2", "t5", "bert"])
def test_the_names_are_those_of_the_files(family, tmp_path):
    model = compress(tiny.build(family), tiny.settings(), output_dir=tmp_path / "whole")
    check(tmp_path / "whole")
    type(model).from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "headless")
    check(tmp_path / "headless")
    assert named(tmp_path / "again") == named(tmp_path / "whole")


def test_dense_layers_are_left_out(tmp_path):
    config = tiny.settings(ignore=[r"layers\.1\.mlp\.up_proj"])
    compress(tiny.build("llama"), config).save_pretrained(tmp_path)
    check(tmp_path)
    assert "model.layers.0.mlp.up_proj" in named(tmp_path)
    assert "model.layers.{0-1}.mlp.gate_proj" in named(tmp_path)


def test_names_do_not_contradict_the_settings_of_a_checkpoint(tmp_path):
    compress(tiny.build("llama"), tiny.settings(), output_dir=tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=tiny.settings())
