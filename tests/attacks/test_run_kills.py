"""Runs that are killed at random moments, or whose disk is full, go on to the same files."""

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attacks.test_kills import Interruption, no_space
from helpers.streamed import content, dense, run

from hf_sparselr.compression.run_folder import NAME

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

TM = {"refine": "tm", "tm": {"passes": 1}}


def forked(work: Callable[[], None]) -> int:
    """Starts work in a child process."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)  # threads of the parent's pools do not live on in a fork
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_run(name: str, folder: Path, delay: float) -> bool:
    """Starts a run, kills it after some seconds, and tells whether it was still at work on the folder."""
    child = forked(lambda: run(name, folder, **TM))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0 and not is_complete(folder)


def is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / NAME).is_dir()


def attack(tmp_path: Path, kills: int) -> list[int]:
    """Kills runs at random moments until there were so many; the finished blocks that each kill left."""
    name, folder = dense("llama", tmp_path / "dense", num_hidden_layers=3), tmp_path / "out"
    started = time.perf_counter()
    assert ended(forked(lambda: run(name, tmp_path / "whole", **TM))) == 0
    seconds, expected = time.perf_counter() - started, content(tmp_path / "whole")
    moments, left = random.Random(0), []
    while len(left) < kills:
        if killed_run(name, folder, moments.uniform(0.1, 1.0) * seconds):
            left.append(len(list(folder.glob(f"{NAME}/*.safetensors"))))
            continue
        assert content(folder) == expected
        shutil.rmtree(folder)
    run(name, folder, **TM)
    assert content(folder) == expected
    assert not list(folder.glob(".*"))
    return left


def test_a_run_that_is_killed_ten_times_writes_the_same_files(tmp_path):
    left = attack(tmp_path, 10)
    assert len(set(left)) > 1, f"the kills came all at one place: {left}"


@pytest.mark.slow
def test_a_run_that_is_killed_fifty_times_writes_the_same_files(tmp_path):
    print(attack(tmp_path, 50))


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path):
    name = dense("llama", tmp_path / "dense", num_hidden_layers=3)
    run(name, tmp_path / "whole")
    expected, told = content(tmp_path / "whole"), 0
    for number in range(1, 120, 17):
        folder = tmp_path / "out"

        def work(folder: Path = folder, number: int = number) -> None:
            Interruption(folder, number, no_space)
            try:
                run(name, folder)
            except OSError as error:
                os._exit(28 if "the disk is full" in str(error) and "start the run again" in str(error) else 1)

        code = ended(forked(work))
        assert code in (0, 28) or is_complete(folder), number  # the finished model is read from the folder
        if code == 28:
            told += 1
            run(name, folder)
        assert content(folder) == expected, number
        shutil.rmtree(folder)
    assert told > 2
