"""Everything that can fail without the weights fails before they are read; loading arguments reach every loader."""

import json
import logging
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.hub_server import HubServer, run_client
from helpers.paths import PYLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_sparselr
from hf_sparselr import compress
from hf_sparselr.compression.plan import plan_layers
from hf_sparselr.entrypoints.output import stored_bytes

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A tiny dense model with a tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    tiny.build("llama", vocab_size=4096, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PYLM / name, folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Reading weights is an error."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", read)


def refine(model, config, output_dir=None):
    return hf_sparselr.refine(model, config, output_dir, reference=model)


VERBS = pytest.mark.parametrize("verb", [compress, refine])


def settings(**changes):
    return tiny.settings(**{"refine": "tm", "tm": {"passes": 1}, **changes})


# Output folder


@VERBS
def test_the_output_folder(dense, no_weights, tmp_path, verb):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below", file / "far" / "below"):
        with pytest.raises(
            NotADirectoryError, match=rf"output_dir='{path}': expected a folder, but '{file}' is a file"
        ):
            verb(str(dense), settings(), path)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 300, "far/" + "x" * 300, 3, b"folder"])
@VERBS
def test_what_is_no_path_of_a_folder(dense, no_weights, tmp_path, monkeypatch, verb, path):
    monkeypatch.chdir(tmp_path)  # where an empty path would write
    with pytest.raises((TypeError, ValueError), match=r"output_dir=.*: expected a "):
        verb(str(dense), settings(), path)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
@VERBS
def test_a_folder_that_cannot_be_written(dense, no_weights, verb):
    with pytest.raises(PermissionError, match="output_dir='/proc/packed': expected a folder that can be written"):
        verb(str(dense), settings(), "/proc/packed")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_another_user(dense, no_weights, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="output_dir="):
        compress(str(dense), settings(), tmp_path / "packed")


def test_too_little_disk(dense, no_weights, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    with pytest.raises(OSError, match=r"output_dir='.*': expected [\d,]+ bytes free \(.*\), found 1,000"):
        compress(str(dense), settings(), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("changes", [{}, {"sparsity": 0.3, "rank": 0}, {"ignore": ["mlp"]}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-tied"])
def test_the_estimate_of_the_space(name, changes, tmp_path):
    model, config = tiny.build(name, torch.bfloat16), tiny.settings(**changes)
    expected = stored_bytes(model, plan_layers(model, config))
    compress(model, config, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert sum(file.get_tensor(key).nbytes for key in file.keys()) == expected  # noqa: SIM118


# Device, generation config


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta", 3.5])
def test_the_device(dense, no_weights, device):
    config = settings(device=device)
    for verb in (compress, refine):
        with pytest.raises(ValueError, match=rf"device={device!r}: "):
            verb(str(dense), config)
    with pytest.raises(ValueError, match=rf"device={device!r}: "):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_a_generation_config_that_cannot_be_saved(dense, tmp_path):
    model = tiny.build("llama")
    model.generation_config.temperature = 0.6  # without do_sample
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"generation_config of .* cannot be saved: .*temperature"):
        compress(model, settings(), tmp_path / "packed")
    assert tiny.same(tiny.snapshot(model), before) and not (tmp_path / "packed").exists()
    model.generation_config.do_sample = True
    compress(model, settings(), tmp_path / "packed")


@pytest.mark.parametrize(
    ("owner", "field", "value"),
    [
        ("config", "temperature", 0.6),
        ("config", "later", object()),
        ("generation_config", "later", object()),
        ("generation_config", "watermarking_config", 3),
    ],
)
def test_a_config_that_transformers_cannot_save(tmp_path, owner, field, value):
    model = tiny.build("llama")
    setattr(getattr(model, owner), field, value)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=f"^{owner} of 'LlamaForCausalLM' cannot be saved: "):
        compress(model, settings(), tmp_path / "packed")
    assert tiny.same(tiny.snapshot(model), before) and not (tmp_path / "packed").exists()


# Tokenizer and processor


def test_the_reason_why_a_tokenizer_cannot_be_loaded(dense, no_weights, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(dense, folder)
    (folder / "tokenizer.json").write_text("{")
    config = settings(calibration=TEXTS)
    with pytest.raises(OSError, match=rf"tokenizer=None: none can be loaded from '{folder}' \(\w+: .+\); pass"):
        compress(str(folder), config)
    with pytest.raises(OSError, match=rf"tokenizer=None: none can be loaded from '{folder}'"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(OSError, match="tokenizer=None: the model was not loaded by name"):
        compress(tiny.build("llama", vocab_size=4096), config)


def test_token_ids_need_no_tokenizer(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: 1 / 0)
    compress(str(dense), settings())


def test_a_checkpoint_without_tokenizer_says_so_once(tmp_path, caplog):
    tiny.build("llama").save_pretrained(tmp_path / "dense")
    with caplog.at_level(logging.WARNING):
        compress(str(tmp_path / "dense"), settings(), tmp_path / "packed")
    told = [record.message for record in caplog.records if "tokenizer" in record.message]
    assert len(told) == 1 and "the checkpoint will hold no tokenizer or processor: none can be loaded" in told[0]


def test_the_tokenizer_of_the_config_is_saved(dense, tmp_path):
    own = tiny.tokenizer()
    own.add_tokens(["<own>"])
    compress(str(dense), settings(tokenizer=own), tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == own.chat_template and saved.convert_tokens_to_ids("<own>") == 4096


# Arguments of from_pretrained


def test_a_subfolder(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "repo" / "inner")
    config = settings(calibration=TEXTS)
    compress(str(tmp_path / "repo"), config, tmp_path / "packed", subfolder="inner")
    AutoModelForCausalLM.from_pretrained(tmp_path / "repo", subfolder="inner", quantization_config=config)
    assert AutoTokenizer.from_pretrained(tmp_path / "packed").vocab_size == 4096
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_code_beside_the_checkpoint(dense, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(dense, folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["architectures"] = ["OwnForCausalLM"]
    stored["auto_map"] = {"AutoModel": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "own.py").write_text(
        "from transformers import LlamaForCausalLM, LlamaModel\n\n\n"
        "class Own(LlamaModel):\n    pass\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    model = compress(str(folder), settings(calibration=TEXTS), tmp_path / "packed", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and type(model).__module__.startswith("transformers_modules")


def test_a_revision_of_the_hub(dense, tmp_path):
    """The second commit has no tokenizer and another vocabulary: everything must come from the first."""
    first = {file.name: file.read_bytes() for file in dense.iterdir()}
    stored = json.loads(first["config.json"])
    with HubServer() as server:
        server.repos["me/dense"] = first
        commit = server.commit_hash("me/dense")
        second = {name: data for name, data in first.items() if not name.startswith("tokenizer")}
        second["config.json"] = json.dumps({**stored, "vocab_size": 7}).encode()
        server.repos["me/dense"] = second
        code = f"""
import hf_sparselr
from transformers import AutoModelForCausalLM, AutoTokenizer
config = hf_sparselr.SparseLRConfig(
    rank=4, refine=None, calibration={TEXTS!r}, num_samples=4, seq_len=32, method_options={tiny.FAST!r}
)
hf_sparselr.compress("me/dense", config, {str(tmp_path / "packed")!r}, revision={commit!r})
assert AutoTokenizer.from_pretrained({str(tmp_path / "packed")!r}).vocab_size == 4096
AutoModelForCausalLM.from_pretrained("me/dense", quantization_config=config, revision={commit!r})
"""
        run_client(server, tmp_path, code)


def test_arguments_for_loading_belong_to_a_name():
    with pytest.raises(TypeError, match="revision: expected a model by name"):
        compress(tiny.build("llama"), settings(), revision="main")


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(2, 2)])
def test_something_else_than_a_model(model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}: expected a transformers model"):
        compress(model, settings())


# Calibration


def test_too_few_tokens_for_the_width_warn(caplog):
    with caplog.at_level(logging.WARNING, "hf_sparselr"):
        compress(tiny.build("llama"), tiny.settings())
        assert "calibration tokens" not in caplog.text
        compress(tiny.build("llama"), tiny.settings(num_samples=1))
    assert "32 calibration tokens are fewer than the " in caplog.text and "down_proj" in caplog.text
