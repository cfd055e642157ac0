"""The benchmarks run end to end, on tiny shapes; what they print is checked, not how fast it is."""

import itertools
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from hf_sparselr.bench import generate, methods
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


def test_methods_runs_every_combination_once(model, tmp_path) -> None:
    folder, tokens = model
    options = ["--methods", "svd", "magnitude", "eora", "--rank", "4", "0", "--sparsity", "2:4", "0.5"]
    changes = ["--refine", "none", "--equal-size", "--set", '{"ignore": ["down_proj"]}']
    assert main(["bench", "methods", folder, "--tokens", tokens, *options, *changes, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())[1:]
    found = [(row["method"], row["sparsity"], row["rank"]) for row in rows]
    assert found[:4] == [("svd", None, 4), ("magnitude", "2:4", 0), ("eora", "2:4", 4), ("eora", "2:4", 0)]
    assert found[4:7] == [("magnitude", 0.5, 0), ("eora", 0.5, 4), ("eora", 0.5, 0)]
    size = {key: row["bytes"] for key, row in zip(found, rows, strict=True)}
    (_, first, _), (_, second, _) = found[7:]  # at the bytes of 2:4 + 4 and of 50% + 4, of the same layers
    for zeros, sparsity in ((first, "2:4"), (second, 0.5)):
        assert size["magnitude", zeros, 0] == pytest.approx(size["eora", sparsity, 4], rel=2e-3)


def test_methods_keeps_what_it_has_and_frees_every_model(model, tmp_path, monkeypatch, capsys) -> None:
    folder, tokens = model
    models, alive = [], []

    def noted(make):
        def wrapped(*args):
            alive.append(sum(seen() is not None for seen in models))
            if len(models) == 5:  # the dense model, then two runs that are loaded again
                raise OSError("no space left")
            made = make(*args)
            models.append(weakref.ref(made))
            return made

        return wrapped

    monkeypatch.setattr(methods, "compress", noted(methods.compress))
    monkeypatch.setattr(methods, "load", noted(methods.load))
    options = ["--methods", "eora", "3basil", "wanda", "--rank", "4", "--refine", "tm+distill"]
    fast = json.dumps({"tm": {"passes": 2, "batch_size": 4}, "distill": {"passes": 1, "self_samples": 0}})
    assert (
        main(
            [
                "bench",
                "methods",
                folder,
                "--tokens",
                tokens,
                *options,
                "--set",
                fast,
                "--output",
                str(tmp_path),
            ]
        )
        == 2
    )
    assert "no space left" in capsys.readouterr().err
    assert [row["method"] for row in json.loads((tmp_path / "results.json").read_text())] == [
        "dense",
        "eora",
        "3basil",
    ]
    assert alive == [0] * 6


def test_a_better_perplexity_has_one_sign() -> None:
    rows = [{"method": "dense", "seconds": 0.0, "bytes": 2e6, "perplexity": {"books": 50.0}}]
    rows.append({**rows[0], "method": "3basil", "perplexity": {"books": 49.75}})
    assert "| 49.75 (-0.25) |" in markdown(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "4", "32"], "rank=32 must be smaller than both sides"),
        (["--sparsity", "2:4", "2:5"], "do not divide into the groups of sparsity='2:5'"),
        (["--sparsity", "half"], "sparsity='half': expected"),
        (["--equal-size"], "--equal-size: expected a pure pruner among --methods"),
        (["--methods", "wanda", "--rank", "0", "--equal-size"], "and a --rank > 0 to match"),
        (["--methods", "svd", "--rank", "0"], "rank=0: expected an integer >= 1"),
        (["--set", '{"seed": 1}'], "'seed'"),
    ],
)
def test_methods_finds_errors_before_the_first_run(model, tmp_path, capsys, options, message) -> None:
    folder, tokens = model
    assert (
        main(
            [
                "bench",
                "methods",
                folder,
                "--tokens",
                tokens,
                "--output",
                str(tmp_path / "out"),
                "--rank",
                "4",
                *options,
            ]
        )
        == 2
    )
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and not (tmp_path / "out").exists()


def test_methods_needs_something_to_score(model, tmp_path, capsys) -> None:
    assert main(["bench", "methods", model[0]]) == 2
    assert "--eval is empty" in capsys.readouterr().err
    save_file({"calibration": tiny.IDS}, tmp_path / "half")
    assert main(["bench", "methods", model[0], "--tokens", str(tmp_path / "half")]) == 2
    assert "expected `calibration` and a set to score on" in capsys.readouterr().err


def test_compress(tiny_preset, tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    options = ["--blocks", "1", "--samples", "2", "--seq-len", "16", "--rank", "4", "--textbook", "--profile"]
    fast = json.dumps({"method_options": tiny.FAST, "tm": {"passes": 1}})
    arguments = ["--preset", "smollm2-135m", *options, "--set", fast, "--device", "cpu", "--json", str(file)]
    assert main(["bench", "compress", *arguments]) == 0
    printed = capsys.readouterr().out
    for phase in ("capture and Gram", "solve", "factorisation", "ADMM", "refit", "TM", "propagation"):
        assert phase in printed
    assert "x faster than the textbook form" in printed and "matrix products: " in printed
    result = json.loads(file.read_text())
    assert len(result["blocks"]) == 2 and len(result["layers"]) == 14
    assert 0 < result["profile"]["share"] < 1


def test_generate(tiny_preset, tmp_path, capsys, monkeypatch) -> None:
    """By a clock that ticks once a pass: rates are tokens a pass."""
    passes, forward = itertools.count(1), LlamaForCausalLM.forward
    clock = SimpleNamespace(now=0, perf_counter=lambda: clock.now)

    def ticking(*args, **kwargs):
        clock.now = next(passes)
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", ticking)
    monkeypatch.setattr(generate, "time", clock)
    file = tmp_path / "result.json"
    options = ["--preset", "smollm2-135m", "--sparsity", "2:4", "0.7", "--rank", "4", "--tokens", "4"]
    cases = ["--mode", "eager", "--batch", "1", "3", "--prompt", "8", "--dtype", "float32", "--device", "cpu"]
    assert main(["bench", "generate", *options, *cases, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    found = [(r["name"], r["batch"], r["prompt"], r["mode"]) for r in results]
    assert found == [(name, batch, 8, "eager") for name in ("2:4", "0.7") for batch in (1, 3)]
    assert all(
        r["first_token"] == 1 and r["rate"] == r["batch"] for pair in results for r in (pair, {**pair, **pair["dense"]})
    )
    pairs, sparse = (results[number]["weights"] for number in (0, 2))
    assert sparse < pairs < results[0]["dense"]["weights"] == results[2]["dense"]["weights"]
    assert "first token ms" in capsys.readouterr().out


def test_host(tiny_preset, tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    options = [
        "--preset",
        "smollm2-135m",
        "--blocks",
        "2",
        "--rows",
        "1",
        "3",
        "--patterns",
        "2:4",
        "--rank",
        "4",
    ]
    assert main(["bench", "host", *options, "--passes", "2", "--device", "cpu", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    found = [(r["weights"], r["rows"]) for r in results]
    assert found == [("dense", 1), ("dense", 3), ("2:4", 1), ("2:4", 3)] and all(r["us"] > 0 for r in results)
    assert "over dense" in capsys.readouterr().out


def test_lora(tiny_preset, tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    options = ["--preset", "smollm2-135m", "--blocks", "2", "--batch", "2", "--length", "8", "--steps", "2"]
    options += ["--rank", "4", "--adapter-rank", "2", "--sparsity", "2:4", "--dtype", "float32"]
    assert main(["bench", "lora", *options, "--device", "cpu", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert [r["weights"] for r in results] == ["dense", "2:4"] and all(
        r["step_ms"] >= r["host_ms"] > 0 for r in results
    )
    assert "time over dense" in capsys.readouterr().out


def test_generate_needs_both_checkpoints(capsys) -> None:
    assert main(["bench", "generate", "--model", "somewhere"]) == 2
    assert "--model and --dense go together" in capsys.readouterr().err


def test_synthetic_inputs_are_correlated(tiny_preset) -> None:
    from hf_sparselr.bench.compress import synthetic_model

    embedding = synthetic_model("smollm2-135m", 1, "cpu").get_input_embeddings().weight.float()
    values = torch.linalg.svdvals(embedding)
    assert values[0] > 3 * values[-1]


def test_kernels(tmp_path, capsys: pytest.CaptureFixture) -> None:
    options = [
        "--shapes",
        "24x36",
        "--rows",
        "1",
        "3",
        "--patterns",
        "2:4",
        "0.7",
        "--rank",
        "2",
        "--dtype",
        "float32",
    ]
    more = ["--repeats", "2", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    assert main(["bench", "kernels", *options, *more]) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(r["pattern"], r["rows"]) for r in results] == [("2:4", 1), ("2:4", 3), ("0.7", 1), ("0.7", 3)]
    assert all(r["error"] < 1e-5 and r["speedup"] > 0 for r in results)
    assert "24x36" in capsys.readouterr().out
    assert main(["bench", "kernels", "--shapes", "24"]) != 0
    assert "--shapes='24'" in capsys.readouterr().err


def test_forms(tmp_path, capsys) -> None:
    weight, inputs = torch.randn(32, 48), torch.randn(200, 48) @ torch.randn(48, 48)
    file, output = tmp_path / "layer.safetensors", tmp_path / "rows.json"
    save_file({"weight": weight, "gram": inputs.T @ inputs}, file)
    arguments = ["--sparsity", "0.5", "--rank", "4", "--depths", "1", "--first-ranks", "2", "3"]
    command = ["bench", "forms", str(file), *arguments, "--permutations", "none", "random"]
    assert main([*command, "--device", "cpu", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert {row["method"] for row in rows} >= {"3basil, flat", "svd, flat", "shss", "3basil", "svd"}
    assert all(row["bytes"] <= rows[0]["bytes"] for row in rows)
    assert all(row["against flat"] == pytest.approx(row["error"] / rows[0]["error"], rel=0.01) for row in rows)
    assert "against flat" in capsys.readouterr().out


def test_model_forms_take_equal_bytes(model, tmp_path) -> None:
    folder, tokens = model
    output = tmp_path / "rows.json"
    split = ["--rank", "4", "--depth", "2", "--smallest-leaf", "4", "--first-ranks", "2"]
    runs = ["--forms", "flat", "hss", "shss", "shss-rcm", "--refine", "none", "--seeds", "0", "1"]
    options = ["--targets", "q_proj", "--set", '{"effort": "fast"}', "--output", str(output)]
    assert main(["bench", "model-forms", folder, "--tokens", tokens, *split, *runs, *options]) == 0
    dense, *rows = json.loads(output.read_text())
    found = [(row["form"], row["seed"]) for row in rows]
    assert found == [("flat", 0), ("hss", 0), ("shss", 0), ("shss-rcm", 0), ("flat", 1), ("hss", 1)]
    assert all(row["bytes"] == pytest.approx(rows[0]["bytes"], rel=1e-3) for row in rows)
    assert set(dense["perplexity"]) == {"heldout"} and rows[1]["layer_error"] < rows[2]["layer_error"]


def test_kernels_of_a_hierarchy(capsys) -> None:
    shape = ["--shapes", "64x96", "--rows", "1", "3", "--patterns", "none", "0.5", "--repeats", "1"]
    options = ["--rank", "4", "--hierarchy", '{"depth": 2}', "--device", "cpu", "--dtype", "float32"]
    assert main(["bench", "kernels", *shape, *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("64x96")]
    assert len(lines) == 4 and all(float(line[8]) < 1e-5 for line in lines)
