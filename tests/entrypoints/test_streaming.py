"""Models that are compressed block by block from their files give the same folders as models in memory."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.streamed import SHARDS, content, dense, run
from transformers import AutoModelForCausalLM

from hf_sparselr import compress
from hf_sparselr.cli import main
from hf_sparselr.compression import block_source, pipeline
from hf_sparselr.compression import run as compression_run
from hf_sparselr.compression.run_folder import NAME, RunFolder
from hf_sparselr.entrypoints import memory_needs, streaming
from hf_sparselr.integrations.transformers import lazy_loading


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return dense("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """What the run in memory writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(llama, folder, stream=False)
    return content(folder)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_streamed_run_writes_what_one_in_memory_writes(family, tmp_path):
    name = dense(family, tmp_path / "dense")
    for stream in (False, True):
        run(name, tmp_path / str(stream), stream)
    assert content(tmp_path / "True") == content(tmp_path / "False")
    assert not (tmp_path / "True" / NAME).exists()


@pytest.mark.parametrize("target", ["block", "stream"])
def test_refinement_streams(target, llama, tmp_path):
    changes = {"refine": "tm", "tm": {"passes": 1, "target": target}}
    for stream in (False, True):
        run(llama, tmp_path / str(stream), stream, **changes)
    assert content(tmp_path / "True") == content(tmp_path / "False")


@pytest.mark.parametrize("activations", ["host", "disk"])
def test_hidden_states_may_wait_elsewhere(activations, llama, tmp_path):
    changes = {"refine": "tm", "tm": {"passes": 1, "target": "mean"}}
    run(llama, tmp_path / "here", **changes)
    run(llama, tmp_path / "there", activations=activations, **changes)
    assert content(tmp_path / "there") == content(tmp_path / "here")


def test_a_snapshot_of_links_is_read(llama, whole, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for file in Path(llama).iterdir():
        (snapshot / file.name).symlink_to(file)
    run(str(snapshot), tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_every_block_is_read_once_and_not_kept(llama, tmp_path, monkeypatch):
    read, in_memory = [], []
    call, finish = lazy_loading.BlockReader.__call__, block_source.StreamedBlocks.finish

    def finish_and_look(self, name, block):
        finish(self, name, block)
        in_memory.append({key for key, tensor in self.model.state_dict().items() if not tensor.is_meta})

    monkeypatch.setattr(lazy_loading.BlockReader, "__call__", lambda self, name: read.append(name) or call(self, name))
    monkeypatch.setattr(block_source.StreamedBlocks, "finish", finish_and_look)
    run(llama, tmp_path / "out", refine="tm", tm={"passes": 1, "target": "stream"})
    assert read == [f"model.layers.{number}" for number in range(3)]
    assert in_memory == [{"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}] * 3


def test_distillation_tells_what_it_holds(llama, tmp_path, caplog):
    caplog.set_level("INFO", "hf_sparselr")
    changes = {"refine": "distill", "distill": {"passes": 1, "self_samples": 0}}
    model = run(llama, tmp_path / "out", "auto", **changes)
    weights = sum(map(torch.numel, AutoModelForCausalLM.from_pretrained(llama).parameters()))
    assert memory_needs.distillation_bytes(model.dequantize(), tiny.settings(**changes)) == 24 * weights
    assert "distillation holds about 0.0 GB on cpu" in caplog.text


def test_the_result_runs(llama, tmp_path):
    model = run(llama, tmp_path / "out")
    assert torch.equal(tiny.logits(model), tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    assert model.sparselr_report.sizes["packed"] < model.sparselr_report.sizes["dense"]


def stopped(monkeypatch, after: int, *args, **kwargs) -> str:
    """Interrupts a run when it has finished some blocks; what it says."""
    store, stored = RunFolder.store, []

    def store_some(self, name, *args):
        if len(stored) == after:
            raise KeyboardInterrupt
        stored.append(name)
        store(self, name, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as caught:
        patched.setattr(RunFolder, "store", store_some)
        run(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(("stream", "target"), [(False, "block"), (True, "stream")])
def test_a_run_goes_on_after_its_last_finished_block(stream, target, llama, tmp_path, monkeypatch):
    changes = {"refine": "tm", "tm": {"passes": 1, "target": target}}
    run(llama, tmp_path / "whole", **changes)
    stopped(monkeypatch, 2, llama, tmp_path / "out", stream, **changes)
    with pytest.raises((OSError, ValueError), match=r"Unrecognized model|config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    worked_on = []
    compress_block = pipeline.compress_block
    monkeypatch.setattr(
        pipeline, "compress_block", lambda name, *args: worked_on.append(name) or compress_block(name, *args)
    )
    run(llama, tmp_path / "out", not stream, **changes)
    assert worked_on == ["model.layers.2"]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_run_that_is_stopped_while_it_distils_goes_on(llama, tmp_path, monkeypatch):
    changes = {"refine": "distill", "distill": {"passes": 1, "self_samples": 0}}
    run(llama, tmp_path / "whole", False, **changes)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="3 finished blocks are kept"):
        patched.setattr(compression_run, "distill", raise_stop)
        run(llama, tmp_path / "out", False, **changes)
    monkeypatch.setattr(pipeline, "compress_block", raise_stop)  # it is not called again
    model = run(llama, tmp_path / "out", False, **changes)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert tiny.same(tiny.snapshot(model), tiny.snapshot(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


def test_other_files_than_safetensors_are_read_whole(llama, whole, tmp_path, monkeypatch, caplog):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"stream=True: blocks are read from .safetensors files, found pytorch_model"):
        run(str(tmp_path / "bin"), tmp_path / "out")
    monkeypatch.setattr(streaming, "available_memory", lambda: 1)
    run(str(tmp_path / "bin"), tmp_path / "out", "auto")
    assert "the model is not streamed" in caplog.text
    weights = [name for name in whole if name.endswith(".safetensors")]
    assert {name: content(tmp_path / "out")[name] for name in weights} == {name: whole[name] for name in weights}


@pytest.mark.parametrize("family", ["t5", "qwen3-moe"])
def test_other_models_go_on_too(family, tmp_path, monkeypatch):
    name = dense(family, tmp_path / "dense")
    run(name, tmp_path / "whole", stream=False)
    stopped(monkeypatch, 1, name, tmp_path / "out")
    run(name, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"calibration": "self"}, "calibration='self' lets the whole dense model write text"),
        (
            {"refine": "tm+distill"},
            r"refine='tm\+distill' trains the whole model, and needs about .* GB of main memory",
        ),
    ],
)
def test_what_cannot_be_streamed_says_what_to_do(changes, told, llama, tmp_path):
    with pytest.raises(ValueError, match=f"stream=True: {told}"):
        run(llama, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_streaming_needs_names_files_and_folders(llama, tmp_path):
    with pytest.raises(ValueError, match="stream='yes': expected True, False or 'auto'"):
        compress(llama, tiny.settings(), tmp_path / "out", stream="yes")
    with pytest.raises(ValueError, match="stream=True: finished blocks go to files: pass output_dir"):
        compress(llama, tiny.settings(), stream=True)
    with pytest.raises(ValueError, match=r"stream=True: .* a model in memory was given: pass its name or directory"):
        compress(tiny.build("llama"), tiny.settings(), tmp_path / "out", stream=True)


def test_auto_streams_what_takes_more_than_half_of_the_free_memory(llama, whole, tmp_path, monkeypatch):
    readers = []
    made = lazy_loading.BlockReader.__init__
    monkeypatch.setattr(lazy_loading.BlockReader, "__init__", lambda *args: readers.append(args) or made(*args))
    size = sum(file.stat().st_size for file in Path(llama).glob("*.safetensors"))
    for name, free in (("large", 3 * size), ("small", size)):
        monkeypatch.setattr(streaming, "available_memory", lambda free=free: free)
        run(llama, tmp_path / name, "auto")
        assert bool(readers) == (name == "small")
        assert content(tmp_path / name) == whole


def test_a_run_with_other_arguments_is_told_what_differs(llama, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(monkeypatch, 1, llama, out, seed=1)
    with pytest.raises(ValueError, match=r"holds an unfinished run with other arguments: config.seed=0 \(there: 1\)"):
        run(llama, out)
    other = dense("llama", tmp_path / "dense", num_hidden_layers=3, rms_norm_eps=1e-3, initializer_range=0.1)
    with pytest.raises(ValueError, match=r"other arguments: model.weights="):
        run(other, out, seed=1)
    with pytest.raises(ValueError, match=r"other arguments: calibration="):
        run(llama, out, seed=1, calibration=tiny.IDS.flip(0))
    assert len(list((out / NAME).glob("*.safetensors"))) == 1
    compress(llama, tiny.settings(), out, stream=True, max_shard_size=SHARDS, overwrite=True)
    assert content(out) == whole


def test_a_checkpoint_is_only_replaced_if_asked_for(llama, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(llama, out, seed=1)
    with pytest.raises(ValueError, match=r"holds a checkpoint \(model.*\): pass another folder, or overwrite=True"):
        run(llama, out)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:
        patched.setattr(RunFolder, "store", lambda *args: raise_stop())
        compress(llama, tiny.settings(), out, overwrite=True)
    AutoModelForCausalLM.from_pretrained(out)  # the old one is whole until then
    compress(llama, tiny.settings(), out, stream=True, max_shard_size=SHARDS, overwrite=True)
    assert content(out) == whole


def raise_stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_two_runs_in_one_folder_are_an_error(tmp_path):
    with RunFolder(tmp_path, {}), pytest.raises(ValueError, match="another process is compressing into it"):
        RunFolder(tmp_path, {}).__enter__()


def test_a_damaged_block_is_compressed_again(llama, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(monkeypatch, 2, llama, out)
    file = out / NAME / "model.layers.1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run(llama, out)
    assert content(out) == whole


def test_an_interrupt_says_how_to_go_on(llama, tmp_path, monkeypatch, capsys):
    told = stopped(monkeypatch, 1, llama, tmp_path / "out")
    assert re.match(r"1 finished blocks are kept in .*: the same call goes on after them", told)
    asked = {}

    def interrupted(*args, **kwargs):
        asked.update(kwargs)
        raise KeyboardInterrupt(told)

    monkeypatch.setattr(importlib.import_module("hf_sparselr.entrypoints.compress"), "compress", interrupted)
    options = ["--stream", "yes", "--overwrite", "--max-shard-size", "30KB"]
    assert main(["compress", llama, "--output", str(tmp_path / "b"), *options]) == 130
    assert f"hf-sparselr: stopped. {told}" in capsys.readouterr().err
    assert asked["stream"] is True and asked["overwrite"] and asked["max_shard_size"] == "30KB"


def test_the_log_of_a_run(llama, tmp_path, monkeypatch):
    changes = {"refine": "tm", "tm": {"passes": 1}}
    stopped(monkeypatch, 1, llama, tmp_path, **changes)
    run(llama, tmp_path, **changes)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "block", "start", "block", "block", "block", "end"]
    assert [line["finished"] for line in lines if line["event"] == "start"] == [0, 1]
    blocks = [line for line in lines[3:] if line["event"] == "block"]
    assert [(line["done"], line["blocks"], line["restored"]) for line in blocks] == [
        (1, 3, True),
        (2, 3, False),
        (3, 3, False),
    ]
    report = json.loads((tmp_path / "sparselr_report.json").read_text())
    rows = report["blocks"]
    assert report["seconds"] > sum(row["seconds"] for row in rows)  # those of the first run too
    assert [line["name"] for line in blocks] == [row["name"] for row in rows]
    assert [line["loss"] for line in blocks] == [row["tm"]["loss_after"] for row in rows]
    assert blocks[0]["remaining"] is None and blocks[1]["remaining"] == pytest.approx(blocks[1]["seconds"])
    assert all(line["host_memory"] > 1e7 and line["gpu_memory"] is None for line in blocks)
