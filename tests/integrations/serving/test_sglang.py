"""The SGLang adapter against a stand-in of the calls of SGLang 0.5.23 that it uses; the real one needs a GPU."""

import json
import sys
import types

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from hf_sparselr import compress
from hf_sparselr.nn.linear import packed_layers

SOURCES = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}


class QuantizationConfig:
    """sglang.srt.layers.quantization.base_config"""

    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {}


class LinearMethodBase:
    """sglang.srt.layers.quantization.base_config"""


class UnquantizedLinearMethod(LinearMethodBase):
    """sglang.srt.layers.quantization.unquant"""

    def create_weights(self, layer, inputs, outs, input_size, output_size, params_dtype, weight_loader):
        layer.weight = nn.Parameter(torch.empty(sum(outs), inputs, dtype=params_dtype), requires_grad=False)
        layer.weight.output_dim, layer.weight.weight_loader = 0, weight_loader

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """sglang.srt.layers.linear, a layer of one or more merged ones on one rank."""

    def __init__(self, sizes, inputs, quant_config, prefix):
        super().__init__()
        self.sizes = sizes  # rows by shard id
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        outs = list(sizes.values())
        self.quant_method.create_weights(
            self, inputs, outs, inputs, sum(outs), torch.float32, weight_loader=self.weight_loader
        )

    def weight_loader(self, parameter, loaded, shard=None):
        first = 0
        for name, size in self.sizes.items():
            if name == shard:
                parameter.data.narrow(parameter.output_dim, first, size).copy_(loaded)
            first += size

    def forward(self, x):
        return self.quant_method.apply(self, x)


@pytest.fixture(autouse=True)
def fresh_plugin():
    """Each test imports the plugin anew."""
    yield
    for name in ("hf_sparselr.integrations.sglang", "hf_sparselr.integrations.sglang.quantization"):
        sys.modules.pop(name, None)


@pytest.fixture
def sglang(monkeypatch):
    """The stand-in as importable modules; gives the registered classes."""
    methods, choices = {"fp8": object}, ["fp8"]
    members = {
        "layers.linear": {"LinearBase": LinearBase},
        "layers.quantization": {"QUANTIZATION_METHODS": methods, "CPU_QUANTIZATION_METHODS": {}},
        "layers.quantization.base_config": {
            "LinearMethodBase": LinearMethodBase,
            "QuantizationConfig": QuantizationConfig,
        },
        "layers.quantization.unquant": {"UnquantizedLinearMethod": UnquantizedLinearMethod},
        "server_args": {"add_quantization_method_choices": choices.extend},
    }
    for name in ("sglang", "sglang.srt", "sglang.srt.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, found in members.items():
        module = types.ModuleType(f"sglang.srt.{name}")
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return methods, choices


def test_registering_tells_the_methods_and_the_command_line(sglang):
    from hf_sparselr.integrations.sglang import register

    methods, choices = sglang
    register()
    register()
    assert methods["sparselr"].get_name() == "sparselr" and choices.count("sparselr") == 1


def test_a_checkpoint_loads_by_the_names_in_its_config(sglang, tmp_path):
    """As SGLang's models do: parameters are found by name, sources of merged layers by a mapping."""
    from hf_sparselr.integrations.sglang import register

    register()
    overrides = {"k_proj": {"rank": 0}, "up_proj": {"skip": True}}
    model = compress(tiny.build("llama"), tiny.settings(overrides=overrides), output_dir=tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = sglang[0]["sparselr"].from_config({**stored, "hf_config": model.config, "packed_modules_mapping": {}})
    engine, merged = nn.ModuleDict(), {}
    for block in range(2):
        for leaf, sources in SOURCES.items():
            owner = "self_attn" if leaf == "qkv_proj" else "mlp"
            prefix = f"model.layers.{block}.{owner}"
            parts = {shard: model.get_submodule(f"{prefix}.{source}") for source, shard in sources.items()}
            sizes = {shard: part.out_features for shard, part in parts.items()}
            layer = LinearBase(sizes, 32, config, f"{prefix}.{leaf}")
            engine[f"{prefix}.{leaf}".replace(".", "/")] = layer
            merged[f"{prefix}.{leaf}".replace(".", "/")] = torch.cat([part.weight + 0 for part in parts.values()])
    parameters = dict(engine.named_parameters())
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        owner, _, source = module.rpartition(".")
        for leaf, sources in SOURCES.items():
            if source in sources:
                parameter = parameters[f"{owner}.{leaf}".replace(".", "/") + f".{part}"]
                parameter.weight_loader(parameter, tensor, sources[source])
    x = torch.randn(3, 32)
    for name, layer in engine.items():
        layer.quant_method.process_weights_after_loading(layer)
        torch.testing.assert_close(layer(x), F.linear(x, merged[name]), atol=1e-5, rtol=1e-5)
    assert len(packed_layers(model)) == 12


def test_layers_that_are_dense_stay_sglangs_own(sglang, tmp_path):
    from hf_sparselr.integrations.sglang import register

    register()
    config = sglang[0]["sparselr"]({"format_version": 1, "packed_layers": ["model.layers.0.mlp.down_proj"]})
    layer = LinearBase({None: 8}, 8, config, "model.layers.0.self_attn.o_proj")
    assert type(layer.quant_method) is UnquantizedLinearMethod
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None


def test_another_sglang_only_loses_our_checkpoints(monkeypatch, caplog):
    from hf_sparselr.integrations.sglang import register

    monkeypatch.setitem(sys.modules, "sglang", None)
    register()
    assert "could not register itself with SGLang" in caplog.text
