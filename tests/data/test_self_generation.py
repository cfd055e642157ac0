"""Text that a model writes itself: windows that go round in circles are written again."""

import logging

import pytest
import torch
from helpers import tiny

from hf_sparselr.data import self_generation
from hf_sparselr.data.self_generation import MOST_REPETITION, repetition, sample_from_model


def decided(scale: float = 300) -> torch.nn.Module:
    """A model that is so sure of its next token that many of its texts turn in circles: a quarter by default."""
    model = tiny.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def written(model: torch.nn.Module, seed: int = 0) -> list[torch.Tensor]:
    return sample_from_model(model, 1, num_samples=12, seq_len=60, seed=seed)


def test_repetition_counts_runs_that_stood_before() -> None:
    assert repetition(torch.arange(20)) == 0
    assert repetition(torch.tensor([1, 2, 3, 4, 9, 1, 2, 3, 4])) == pytest.approx(1 / 6)
    assert repetition(torch.tensor([5, 6] * 10)) == pytest.approx(1 - 2 / 17)
    assert repetition(torch.tensor([1, 2])) == 0  # shorter than a run


def test_windows_that_go_round_in_circles_are_written_again(monkeypatch, caplog) -> None:
    windows = written(decided())
    assert len(windows) == 12 and all(len(window) == 60 for window in windows)
    assert max(map(repetition, windows)) <= MOST_REPETITION
    with monkeypatch.context() as patch:
        patch.setattr(self_generation, "MOST_REPETITION", 1.0)
        first = written(decided())
    good = [window for window in first if repetition(window) <= MOST_REPETITION]
    assert 0 < len(good) < 12
    assert torch.equal(torch.stack(windows[: len(good)]), torch.stack(good))
    assert torch.equal(torch.stack(windows), torch.stack(written(decided())))
    assert not caplog.records


def test_windows_continue_their_prompts_also_when_written_again(monkeypatch) -> None:
    monkeypatch.setattr(self_generation, "ATTEMPTS", 50)
    monkeypatch.setattr(self_generation, "MOST_REPETITION", 0.1)
    prompts = torch.arange(36).view(12, 3) + 4
    windows = sample_from_model(decided(150), 1, num_samples=12, seq_len=60, seed=0, prompts=prompts)
    assert max(map(repetition, windows)) <= 0.1
    starts = torch.stack([window[:3] for window in windows])
    assert not torch.equal(starts, prompts)  # some were written again
    assert torch.equal(starts[starts[:, 0].argsort()], prompts)


def test_a_model_that_only_repeats_itself_is_said(monkeypatch, caplog) -> None:
    monkeypatch.setattr(self_generation, "MOST_REPETITION", -1.0)
    with caplog.at_level(logging.WARNING, "hf_sparselr"):
        windows = written(decided())
    assert len(windows) == 12
    assert "repeats itself in 12 of 12 windows" in caplog.text
    found = [repetition(window) for window in windows]
    assert found == sorted(found) and found[-1] < 0.4  # the best of three times as many
