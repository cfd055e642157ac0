"""Phases: seconds add up by name."""

import time

import pytest
import torch

from hf_sparselr.utils.phase_timer import PhaseTimer


def test_seconds_of_a_phase_add_up() -> None:
    phases = PhaseTimer(torch.device("cpu"))
    for pause in (0.02, 0.03):
        with phases("solve"):
            time.sleep(pause)
    with phases("pack"):
        pass
    assert list(phases.seconds) == ["solve", "pack"]
    assert 0.05 <= phases.seconds["solve"] < 0.5
    assert 0 <= phases.seconds["pack"] < 0.02
    assert phases.peaks == {}  # of GPUs alone


def test_phases_nest() -> None:
    phases = PhaseTimer(torch.device("cpu"))
    with phases("outer"), phases("inner"):
        time.sleep(0.01)
    assert phases.seconds["outer"] >= phases.seconds["inner"] >= 0.01


def test_what_a_solver_measured_is_added() -> None:
    phases = PhaseTimer(torch.device("cpu"))
    phases.add({"ADMM": 1.0})
    phases.add({"ADMM": 0.5, "refit": 2.0})
    assert phases.seconds == {"ADMM": 1.5, "refit": 2.0}


def test_an_error_passes_through() -> None:
    phases = PhaseTimer(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), phases("solve"):
        _ = 1 / 0
    assert phases.seconds == {}


@pytest.mark.gpu
def test_peaks_are_those_of_each_phase() -> None:
    phases = PhaseTimer(torch.device("cuda"))
    held = torch.cuda.memory_allocated()
    for size in (2**22, 2**20):
        with phases(f"{size}"):
            torch.empty(size, dtype=torch.uint8, device="cuda")
    with phases(f"{2**20}"):
        pass
    assert [peak - held for peak in phases.peaks.values()] == [2**22, 2**20]
    with PhaseTimer(torch.device("cuda"), memory=False)("quiet"):
        torch.empty(2**20, dtype=torch.uint8, device="cuda")
