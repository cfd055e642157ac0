import json
import re

import pytest
import torch
from helpers import tiny
from helpers.early_errors import EARLY_ERRORS
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    CompileConfig,
    GenerationConfig,
)

from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.format.checkpoint import FormatError
from hf_sparselr.format.seal import seal
from hf_sparselr.nn.linear import packed_layers

Q = "model.layers.0.self_attn.q_proj"
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    tiny.build("llama", torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """(directory, logits) of a packed checkpoint, with a layer of rank 0."""
    path = tmp_path_factory.mktemp("packed")
    model = compress(dense, tiny.settings(overrides={"k_proj": {"rank": 0}}), output_dir=path)
    return path, tiny.logits(model)


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


# --- loading and saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_compression_while_loading_equals_the_offline_way(dense, device_map):
    config = tiny.settings()
    model = load(dense, quantization_config=config, device_map=device_map)
    offline = compress(dense, config)
    assert len(packed_layers(model)) == 14 and len(model.sparselr_report.layers) == 14
    assert tiny.same(tiny.snapshot(model), tiny.snapshot(offline))


def test_a_model_compressed_while_loading_saves_and_reloads(dense, tmp_path):
    model = load(dense, quantization_config=tiny.settings())
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(load(tmp_path)), tiny.logits(model))


@pytest.mark.parametrize("kwargs", [{}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_a_packed_checkpoint_loads_to_the_bit(packed, kwargs):
    path, expected = packed
    model = load(path, **kwargs)
    assert torch.equal(tiny.logits(model), expected)
    assert model.dtype == torch.bfloat16 and len(model.sparselr_report.layers) == 14
    layers = packed_layers(model)
    assert len(layers) == 14 and all(layer.rank == (0 if "k_proj" in name else 4) for name, layer in layers.items())
    assert not any(p.requires_grad for layer in layers.values() for p in layer.parameters())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "qwen2", "gemma3", "neox", "phi3", "bert-mlm", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_reloads_to_the_bit(name, dtype, tmp_path):
    model = compress(tiny.build(name, dtype), tiny.settings(), output_dir=tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert tiny.same(tiny.snapshot(loaded), tiny.snapshot(model))
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert not any(map(len, info.values()))


def test_tied_embeddings_stay_tied(tmp_path):
    model = compress(tiny.build("llama-tied"), tiny.settings(), output_dir=tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for tied in (model, load(tmp_path)):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_shards_and_second_generation_copies(packed, tmp_path):
    path, expected = packed
    model = load(path)
    model.save_pretrained(tmp_path / "again")
    files = [(p / "model.safetensors").read_bytes() for p in (path, tmp_path / "again")]
    assert files[0] == files[1]
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(tiny.logits(load(tmp_path / "shards")), expected)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_dtype_override(family, auto, tmp_path):
    compress(tiny.build(family, torch.bfloat16), tiny.settings(), output_dir=tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    stored = {re.sub(r"^(model|gpt_neox)\.", "", key): tensor for key, tensor in files.items()}
    for dtype in (torch.float32, torch.float16):
        model = auto.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
        assert {layer.dtype for layer in packed_layers(model).values()} == {dtype}
        for name, tensor in model.state_dict().items():
            key = re.sub(r"^(model|gpt_neox)\.", "", name)
            source = stored[key] if key in stored else stored["embed_out.weight"]
            assert torch.equal(tensor, source.to(tensor.dtype))


def test_classes_with_and_without_a_head_read_each_others_files(packed, tmp_path):
    path, _ = packed
    hidden = load(path).model(tiny.IDS)[0]
    base, info = AutoModel.from_pretrained(path, output_loading_info=True)
    assert len(packed_layers(base)) == 14 and torch.equal(base(tiny.IDS)[0], hidden)
    assert set(info["unexpected_keys"]) == {"lm_head.weight"} and not info["missing_keys"]
    base.save_pretrained(tmp_path)
    headed, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(packed_layers(headed)) == 14 and torch.equal(headed.model(tiny.IDS)[0], hidden)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and not info["unexpected_keys"]


OFFLOAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_disk_offload_of_a_packed_model(packed, tmp_path):
    path, expected = packed
    model = load(path, device_map=OFFLOAD, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.mask.is_meta
    assert torch.equal(tiny.logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.logits(load(tmp_path / "saved")), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_dequantize_gives_a_plain_model(name, tmp_path):
    model = compress(tiny.build(name), tiny.settings(), output_dir=tmp_path / "packed")
    cls = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    plain = cls.from_pretrained(tmp_path / "packed").dequantize()
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(model), atol=1e-5, rtol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any(key.endswith((".mask", ".values")) for key in load_file(tmp_path / "plain" / "model.safetensors"))
    loaded = cls.from_pretrained(tmp_path / "plain")
    assert not packed_layers(loaded) and torch.equal(tiny.logits(loaded), tiny.logits(plain))


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(packed, cache):
    path, _ = packed
    model = load(path)
    expected = load(path).dequantize().generate(tiny.IDS, **GENERATE)
    out = model.generate(tiny.IDS, cache_implementation=cache, **GENERATE)
    assert out.shape == (4, 38)
    assert (out == expected).float().mean() > 0.95  # the two round differently


def test_a_static_cache_compiles(packed):
    """On the CPU transformers compiles only when told to; a quantizer that is not compileable stays eager."""
    path, _ = packed
    model = load(path)
    plan = CompileConfig(backend="eager", mode=None)
    plan._compile_all_devices = True
    config = GenerationConfig(cache_implementation="static", compile_config=plan, **GENERATE)
    out = model.generate(tiny.IDS[:1], generation_config=config)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(out, load(path).generate(tiny.IDS[:1], **GENERATE))


# --- corrupt checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A packed model with biases, whose 36 inputs do not fill whole mask bytes."""
    path = tmp_path_factory.mktemp("ragged")
    model = tiny.build("llama", hidden_size=36, attention_bias=True)
    compress(model, tiny.settings(), output_dir=path)
    return path


@pytest.fixture
def rewrite(ragged, tmp_path):
    """Copies the checkpoint with its tensors changed."""

    def write(change):
        for file in ragged.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        seal(tmp_path, [tmp_path / "model.safetensors"], {})  # the change is to be found without the seal's help
        return tmp_path

    return write


def drop(*parts, layer=Q):
    def change(tensors):
        for part in parts:
            del tensors[f"{layer}.{part}"]

    return change


def put(part, value, layer=Q):
    def change(tensors):
        tensors[f"{layer}.{part}"] = value(tensors.get(f"{layer}.{part}"))

    return change


def rename(tensors):
    for part in ("mask", "values", "A", "B", "bias", "weight"):
        tensors[f"{Q}_typo.{part}"] = tensors.pop(f"{Q}.{part}")


def set_bit(row, byte, bit):
    def change(mask):
        mask = mask.clone()
        mask[row, byte] ^= 1 << bit
        return mask

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("mask"), rf"{Q}.mask is missing"),
        (drop("values"), rf"{Q}.values is missing"),
        (drop("weight"), rf"{Q}.weight is missing"),
        (drop("bias"), rf"{Q}.bias is missing"),
        (drop("A"), rf"{Q}.A is missing: the factors come in pairs"),
        (drop("B"), rf"{Q}.B is missing: the factors come in pairs"),
        (drop("mask", "values", "A", "B", "bias", "weight"), rf"{Q}.mask is missing"),
        (drop("mask", "values", "A", "B", "bias"), rf"{Q}.mask is missing"),
        (rename, rf"{Q}_typo.mask is unexpected"),
        (
            put("bias", lambda _: torch.zeros(64), "model.layers.1.mlp.up_proj"),
            r"model.layers.1.mlp.up_proj.bias is unexpected",
        ),
        (put("mask", lambda t: t[:, :4].clone()), rf"{Q}.mask has shape \(32, 4\), expected \(32, 5\)"),
        (put("mask", lambda t: t[:16].clone()), rf"{Q}.mask has shape \(16, 5\)"),
        (put("values", lambda t: t[None]), rf"{Q}.values has shape \(1, 576\)"),
        (put("values", lambda t: t[:-1].clone()), rf"{Q}.values holds 575 values, but the mask keeps 576"),
        (put("A", lambda t: t[:, :32].clone()), rf"{Q}.A has shape \(4, 32\), expected \(4, 36\)"),
        (put("A", lambda t: t[:3].clone()), rf"{Q}.B has shape \(32, 4\), expected \(32, 3\)"),
        (put("B", lambda t: t[:16].clone()), rf"{Q}.B has shape \(16, 4\), expected \(32, 4\)"),
        (put("bias", lambda t: t[:16].clone()), rf"{Q}.bias has shape \(16,\), expected \(32,\)"),
        (put("weight", lambda t: torch.zeros(32, 36)), rf"{Q}.weight has shape \(32, 36\), expected \(0,\)"),
        (put("mask", lambda t: t.to(torch.int16)), rf"{Q}.mask has dtype I16, expected U8"),
        (put("values", lambda t: t.int()), rf"{Q}.values has dtype I32, expected one of F64"),
        (put("bias", lambda t: t.int()), rf"{Q}.bias has dtype I32, expected one of F64"),
        (put("B", lambda t: t.half()), rf"{Q}.B has dtype F16, but the values have F32"),
        (put("mask", set_bit(3, 4, 5)), rf"{Q}.mask has bits set beyond the layer's 36 inputs"),
        (put("mask", set_bit(3, 0, 0)), rf"{Q}.values holds 576 values, but the mask keeps 57[57]"),
    ],
)
def test_a_corrupt_checkpoint_is_refused_with_file_and_tensor(rewrite, change, message):
    path = rewrite(change)
    with pytest.raises(FormatError, match=rf"^{re.escape(str(path))}(/model.safetensors)?: tensor {message}"):
        load(path)


def test_the_intact_checkpoint_loads(rewrite):
    path = rewrite(lambda tensors: None)
    assert len(packed_layers(load(path))) == 14


def test_a_truncated_file_is_refused(rewrite):
    path = rewrite(lambda tensors: None) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=rf"^{re.escape(str(path))}: not a complete safetensors file"):
        load(path.parent)


def test_a_pickle_is_refused(rewrite):
    path = rewrite(lambda tensors: None)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"is stored in \.safetensors files"):
        load(path, use_safetensors=False)


def test_a_newer_format_is_refused(rewrite):
    path = rewrite(lambda tensors: None) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"format_version=2: .* up to version 1; upgrade"):
        load(path.parent)


# --- configs that do not fit -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:You passed `quantization_config`")
def test_a_config_beside_a_packed_checkpoint_must_agree(packed):
    path, expected = packed
    same = {"overrides": {"k_proj": {"rank": 0}}}
    assert torch.equal(tiny.logits(load(path, quantization_config=tiny.settings(**same))), expected)
    for changes, field in (
        ({"rank": 3}, "rank=3"),
        ({"sparsity": 0.5}, "sparsity=0.5"),
        ({"seed": 7}, "seed=7"),
    ):
        with pytest.raises(ValueError, match=rf"already compressed with other settings: {field} \(stored: "):
            load(path, quantization_config=tiny.settings(**same, **changes))


@pytest.mark.filterwarnings("error:You passed `quantization_config`")
def test_a_kernel_is_chosen_while_loading(packed):
    path, expected = packed
    model = load(path, quantization_config=SparseLRConfig(kernel="dense"))
    assert {layer.kernel for layer in packed_layers(model).values()} == {"dense"}
    assert torch.allclose(tiny.logits(model), expected, atol=1e-2)
    assert model.config.quantization_config.rank == tiny.settings().rank


def test_the_config_of_another_method_is_refused(packed):
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        load(packed[0], quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_offloading_while_compressing_is_refused(dense, tmp_path):
    with pytest.raises(ValueError, match=r"device_map=.* offloads weights.*hf_sparselr\.compress"):
        load(dense, quantization_config=tiny.settings(), device_map=OFFLOAD, offload_folder=tmp_path)


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory):
    """A dense checkpoint whose weights cannot be read, with a tokenizer."""
    path = tmp_path_factory.mktemp("corrupt")
    tiny.build("llama", vocab_size=4096).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    return path


@pytest.mark.parametrize(("changes", "message"), [case for case in EARLY_ERRORS if "custom" not in str(case)])
def test_errors_come_before_the_weights_are_read(changes, message, corrupt):
    with pytest.raises(ValueError, match=message):
        load(corrupt, quantization_config=tiny.settings(**changes))


def test_heads_and_poolers_stay_dense(tmp_path):
    model = compress(tiny.build("bert-mlm"), tiny.settings(), output_dir=tmp_path)
    outside = [
        name for name, module in type(model).from_pretrained(tmp_path).named_modules() if type(module) is nn.Linear
    ]
    assert outside and all(name.startswith("cls.") for name in outside)
