"""Files are written beside the old ones and moved into place; tests/attacks kills this at every event."""

import os
import subprocess
import sys

import pytest

from hf_sparselr.format import staging
from hf_sparselr.format.staging import Staging, stale, unfinished, write_text


def fill(folder, *names, text="new"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_commit_replaces_and_removes_weight_files_and_keeps_the_rest(tmp_path):
    fill(
        tmp_path,
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "model.safetensors.index.json",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "config.json",
        "notes.txt",
        text="old",
    )
    new = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "config.json",
        "code/own.py",
    ]
    with Staging(tmp_path) as save:
        fill(save.folder, *new)
        assert sorted(save.commit()) == sorted(new)
    assert content(tmp_path) == {
        **dict.fromkeys(new, "new"),
        **dict.fromkeys(("model.fp16.safetensors", "pytorch_model.bin", "notes.txt"), "old"),
    }


def test_the_config_is_moved_last_and_weights_first(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, to: (moved.append(to.name), replace(source, to)))
    with Staging(tmp_path) as save:
        fill(save.folder, "a.txt", "config.json", "model.safetensors", "z.txt")
        save.commit()
    assert moved == ["model.safetensors", "a.txt", "z.txt", "config.json"]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (None, ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]),
        (
            "fp16",
            [
                "model.fp16.safetensors",
                "model.fp16-00001-of-00002.safetensors",
                "model.safetensors.index.fp16.json",
            ],
        ),
    ],
)
def test_stale_files_are_those_that_transformers_reads(variant, expected):
    present = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
        "adapter_model.safetensors",
        "model-x.safetensors",
        "mymodel.safetensors",
        "config.json",
    ]
    assert stale(present, ["written"], variant) == expected
    assert stale(present, expected, variant) == []


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    fill(tmp_path, "model.safetensors", "config.json", text="old")
    before = content(tmp_path)
    with pytest.raises(OSError), Staging(tmp_path) as save:
        fill(save.folder, "model.safetensors")
        raise OSError
    assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_move_that_fails_keeps_the_rest_only_if_something_was_moved(tmp_path, monkeypatch, fails_at):
    fill(tmp_path, "model.safetensors", "config.json", text="old")
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) > fails_at:
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"), Staging(tmp_path) as save:
        fill(save.folder, "model.safetensors", "config.json")
        save.commit()
    rest = unfinished(tmp_path)
    assert (rest is None) == (fails_at == 0)
    assert content(tmp_path).get("config.json") == "old"
    if rest is not None:
        assert content(rest) == {"config.json": "new"}


def test_leftovers_of_processes_that_are_gone_are_removed_and_others_stay(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    node = staging.platform.node()
    dead = tmp_path / f".sparselr-save-{node}-{gone.stdout.strip()}-00000000.partial"
    running = tmp_path / f".sparselr-save-{node}-{os.getppid()}-00000000.partial"
    elsewhere = tmp_path / ".sparselr-save-other-1-00000000.complete"
    for folder in (dead, running, elsewhere, tmp_path / ".sparselr-save-mine"):
        fill(folder, "x")
    assert unfinished(tmp_path) == elsewhere
    with Staging(tmp_path) as save:
        save.commit()
    assert not dead.exists() and running.exists() and elsewhere.exists()
    for path in (elsewhere / "x", elsewhere):
        os.utime(path, (0, 0))
    with Staging(tmp_path) as save:
        save.commit()
    assert not elsewhere.exists()


def test_text_is_written_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_text(path, "new")
    assert content(tmp_path) == {"a.json": "old"}
    write_text(path, "new")
    assert content(tmp_path) == {"a.json": "new"}
