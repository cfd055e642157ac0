"""Saves that are killed, or fail, at every event that touches a file: what is left is one save or the other.

The numbers of the whole attack (marker slow) are in hf_sparselr/format/README.md.
"""

import contextlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from helpers import checkpoints, tiny
from transformers import AutoModelForCausalLM

from hf_sparselr.format.staging import Staging

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

EVENTS = ("open", "os.", "shutil.", "mmap.")
WHOLE, SHARDS, OTHER_SHARDS = "1GB", "40KB", "25KB"
# how the old and the new checkpoint are cut into files
CHANGES = [(WHOLE, WHOLE), (WHOLE, SHARDS), (SHARDS, WHOLE), (SHARDS, SHARDS), (SHARDS, OTHER_SHARDS)]


class Interruption:
    """Calls `action` at the `number`-th event that touches a file below `folder`; counts them."""

    def __init__(self, folder: Path, number: int, action: Callable[[str, tuple], None]) -> None:
        self.folder, self.number, self.action, self.count = str(folder), number, action, 0
        write = safetensors.torch.serialize_file

        def serialize_file(data, filename, *args, **kwargs):  # Rust, of which Python's audit events see nothing
            self.note("open", filename, "w")
            write(data, filename, *args, **kwargs)
            self.note("written", filename)

        safetensors.torch.serialize_file = serialize_file
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if event.startswith(EVENTS):
            self.note(event, *args)

    def note(self, event: str, *args: object) -> None:
        if not any(isinstance(arg, (str, os.PathLike)) and str(arg).startswith(self.folder) for arg in args):
            return
        self.count += 1
        if self.count == self.number:
            self.action(event, args)


def kill(event: str, args: tuple) -> None:
    """Ends the process, after half of a file was written if it is being opened for writing."""
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        descriptor = os.open(args[0], os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b'\x10\x00{"half')
    os._exit(9)


def no_space(event: str, args: tuple) -> None:
    raise OSError(28, "No space left on device")


def save_in_a_fork(model, folder: Path, size: str, number: int, action: Callable[[str, tuple], None]) -> int:
    """Saves in a child process that is interrupted; 0 if the event was never reached, 9 if it was."""
    child = os.fork()
    if not child:
        code = 1
        try:
            interruption = Interruption(folder, number, action)
            with contextlib.suppress(OSError):
                model.save_pretrained(folder, max_shard_size=size)
            code = 9 if interruption.count >= number else 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def found(folder: Path, states: dict[str, dict]) -> str:
    """The name of the state that a folder holds, "refused" or "mixture"."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (ValueError, OSError):
        return "refused"
    state = tiny.snapshot(model)
    return next((name for name, known in states.items() if tiny.same(state, known)), "mixture")


def attack(tmp_path: Path, changes: list[tuple[str, str]], action: Callable, step: int) -> Counter:
    old, new = (checkpoints.compressed(seed) for seed in (0, 1))
    states = {"old": tiny.snapshot(old), "new": tiny.snapshot(new)}
    counts: Counter = Counter()
    for before, after in changes:
        start = tmp_path / f"{before}-{after}"
        old.save_pretrained(start, max_shard_size=before)
        number, reached = 1, True
        while reached:
            folder = tmp_path / "folder"
            shutil.copytree(start, folder)
            code = save_in_a_fork(new, folder, after, number, action)
            assert code in (0, 9), code
            reached = code == 9
            result = found(folder, states)
            counts[result] += 1
            assert result != "mixture" and (reached or result == "new"), (before, after, number, result)
            if action is no_space and result == "old":
                assert not list(folder.glob("*.partial")), "a save that failed before it moved a file leaves nothing"
            new.save_pretrained(folder, max_shard_size=after)
            assert found(folder, states) == "new"
            assert not list(folder.glob(".*")), "the next save removes what the killed one left"
            shutil.rmtree(folder)
            number += step
    return counts


def test_a_few_kills_leave_one_save_or_the_other(tmp_path):
    counts = attack(tmp_path, [(WHOLE, SHARDS), (SHARDS, SHARDS)], kill, step=17)
    assert counts["old"] and counts["new"]


def test_a_full_disk_leaves_the_old_save(tmp_path):
    counts = attack(tmp_path, [(SHARDS, WHOLE)], no_space, step=17)
    assert counts["old"]


@pytest.mark.slow
@pytest.mark.parametrize("action", [kill, no_space])
def test_an_interruption_at_every_event_leaves_one_save_or_the_other(action, tmp_path):
    print(dict(attack(tmp_path, CHANGES, action, step=1)))


def test_a_kill_while_files_are_moved_is_refused_and_says_where_the_rest_is(tmp_path, monkeypatch):
    old, new = (checkpoints.compressed(seed) for seed in (0, 1))
    folder = tmp_path / "model"
    old.save_pretrained(folder)
    replace = os.replace

    def stop_at_config(source, target):
        if Path(target) == folder / "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop_at_config)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"different saves\. A save was interrupted here; the rest .*\.complete"):
        AutoModelForCausalLM.from_pretrained(folder)
    (rest,) = folder.glob(".sparselr-save-*.complete")
    for path in rest.iterdir():  # what the message says
        replace(path, folder / path.name)
    assert tiny.same(tiny.snapshot(AutoModelForCausalLM.from_pretrained(folder)), tiny.snapshot(new))


def test_a_folder_made_for_a_save_that_fails_vanishes(tmp_path):
    with pytest.raises(RuntimeError), Staging(tmp_path / "a" / "b") as staging:
        (staging.folder / "config.json").write_text("{}")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
