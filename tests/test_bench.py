"""The benchmarks run end to end, on tiny shapes; what they print is checked, not how fast it is."""

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

from hf_sparselr.bench.methods import markdown
from hf_sparselr.bench.presets import PRESETS
from hf_sparselr.cli import main

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "smollm2-135m", TINY)


@pytest.fixture
def model(tmp_path) -> tuple[str, str]:
    """A saved model, and a file of calibration and evaluation tokens."""
    folder, tokens = tmp_path / "model", tmp_path / "tokens.safetensors"
    tiny.build("llama").save_pretrained(folder)
    save_file({"calibration": tiny.IDS, "heldout": tiny.IDS.flip(1)}, tokens)
    return str(folder), str(tokens)


def test_methods(model, tmp_path, capsys) -> None:
    folder, tokens = model
    options = ["--methods", "eora", "wanda", "svd", "--rank", "4", "--refine", "none", "--equal-size"]
    out = tmp_path / "out"
    assert main(["bench", "methods", folder, "--tokens", tokens, *options, "--output", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())
    found = [(row["method"], row.get("sparsity"), row.get("rank")) for row in rows]
    assert found[:4] == [("dense", None, None), ("eora", "2:4", 4), ("wanda", "2:4", 0), ("svd", None, 4)]
    assert found[4][0] == "wanda" and found[4][2] == 0
    assert rows[1]["bytes"] < rows[0]["bytes"]
    assert rows[4]["bytes"] == pytest.approx(rows[1]["bytes"], rel=2e-3)  # at equal size
    assert all(set(row["perplexity"]) == {"heldout"} for row in rows)
    assert (out / "results.md").read_text().strip() == markdown(rows)
    assert (out / "results.png").stat().st_size > 0
    assert "| wanda | 2:4 | 0 |" in capsys.readouterr().out


def test_methods_needs_something_to_score(model, capsys) -> None:
    assert main(["bench", "methods", model[0]]) == 2
    assert "--eval is empty" in capsys.readouterr().err


def test_compress(tiny_preset, tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    options = ["--blocks", "1", "--samples", "2", "--seq-len", "16", "--rank", "4", "--textbook", "--profile"]
    fast = json.dumps({"solver": tiny.FAST, "tm": {"passes": 1}})
    arguments = ["--preset", "smollm2-135m", *options, "--set", fast, "--device", "cpu", "--json", str(file)]
    assert main(["bench", "compress", *arguments]) == 0
    printed = capsys.readouterr().out
    for phase in ("capture and Gram", "solve", "factorisation", "ADMM", "refit", "TM", "propagation"):
        assert phase in printed
    assert "x faster than the textbook form" in printed and "matrix products: " in printed
    result = json.loads(file.read_text())
    assert len(result["blocks"]) == 2 and len(result["layers"]) == 14
    assert 0 < result["profile"]["share"] < 1


def test_generate(tiny_preset, tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    options = [
        "--preset",
        "smollm2-135m",
        "--sparsity",
        "2:4",
        "0.7",
        "--rank",
        "4",
        "--prompt",
        "8",
        "--tokens",
        "4",
    ]
    fast = ["--eager", "--dtype", "float32", "--device", "cpu", "--json", str(file)]
    assert main(["bench", "generate", *options, *fast]) == 0
    results = json.loads(file.read_text())
    assert list(results) == ["dense", "2:4", "0.7"]
    assert results["0.7"]["weights"] < results["2:4"]["weights"] < results["dense"]["weights"]
    assert all(result["decode"] > 0 and result["prefill"] > 0 for result in results.values())
    assert "decode tok/s" in capsys.readouterr().out


def test_generate_needs_both_checkpoints(capsys) -> None:
    assert main(["bench", "generate", "--model", "somewhere"]) == 2
    assert "--model and --dense go together" in capsys.readouterr().err


def test_synthetic_inputs_are_correlated(tiny_preset) -> None:
    from hf_sparselr.bench.compress import synthetic_model

    embedding = synthetic_model("smollm2-135m", 1, "cpu").get_input_embeddings().weight.float()
    values = torch.linalg.svdvals(embedding)
    assert values[0] > 3 * values[-1]
