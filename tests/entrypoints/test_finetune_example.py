"""The fine-tuning example, end to end on the embedded model: own factors start lower and end no higher."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.paths import ROOT
from transformers import AutoModelForCausalLM

import hf_sparselr


def test_own_factors_start_lower_and_end_no_higher(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    text = (ROOT / "hf_sparselr" / "solvers" / "base.py").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text * 2, encoding="utf-8")
    ids = torch.tensor(tiny.tokenizer()(text)["input_ids"][:512]).view(-1, 64)
    model = AutoModelForCausalLM.from_pretrained(tiny.PYLM, dtype=torch.float32)
    hf_sparselr.compress(model, tiny.settings(calibration=ids, num_samples=8, seq_len=64)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    options = {
        "model": tmp_path,
        "train": f"file:{tmp_path}/text.txt",
        "test": f"file:{tmp_path}/text.txt",
        "length": 64,
        "batch-size": 4,
        "steps": 4,
        "evaluations": 2,
        "test-windows": 4,
        "device": "cpu",
        "json": tmp_path / "result.json",
        "png": tmp_path / "curves.png",
    }
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", *arguments])
    monkeypatch.syspath_prepend(ROOT / "examples")
    runpy.run_path(str(ROOT / "examples" / "finetune_lora.py"), run_name="__main__")
    result = json.loads((tmp_path / "result.json").read_text())
    own, *others = result["curves"].values()
    assert [step for step, _ in own] == [0, 2, 4]
    start, end = own[0][1], own[-1][1]
    assert start == pytest.approx(result["references"]["compressed"]) and end < start
    assert all(start <= other[0][1] * (1 + 1e-6) and end <= other[-1][1] for other in others)
    assert len(others) == 3 and (tmp_path / "curves.png").stat().st_size > 10_000
    assert "| own factors |" in capsys.readouterr().out
