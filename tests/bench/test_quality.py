"""The bench of families, and the measures that it takes."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from hf_sparselr.bench import measures
from hf_sparselr.bench.quality import Cell, _Results
from hf_sparselr.bench.quality_tables import markdown
from hf_sparselr.cli import main

WORDS = [f"w{index}" for index in range(90)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_compare_is_exact() -> None:
    dense, other = tiny.build("llama"), tiny.build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    windows = tiny.IDS[:3]
    found = measures.compare(other, dense, windows)
    with torch.no_grad():
        mine, theirs = (F.log_softmax(model(windows).logits[:, :-1].double(), -1) for model in (other, dense))
    loss = [-each.gather(-1, windows[:, 1:, None]).mean() for each in (mine, theirs)]
    assert found["perplexity"] == pytest.approx(math.exp(loss[0]), rel=1e-5)
    assert found["gap"] == pytest.approx(math.exp(loss[0]) - math.exp(loss[1]), rel=1e-3)
    assert found["kl"] == pytest.approx(float((theirs.exp() * (theirs - mine)).sum(-1).mean()), rel=1e-4)
    assert 0 < found["agreement"] < 1 and found["kl"] > 1e-4
    assert found["agreement"] == pytest.approx(float((mine.argmax(-1) == theirs.argmax(-1)).double().mean()))
    assert measures.compare(dense, dense, windows) == pytest.approx(
        {"perplexity": math.exp(loss[1]), "gap": 0, "kl": 0, "agreement": 1}, rel=1e-5
    )


def test_passages_hide_their_last_word(tokenizer) -> None:
    long, short = " ".join(WORDS[:50]), " ".join(WORDS[:10])
    text = f"{long} w7.\n\n{short} w8.\n\n{long} w9 --\n\n{long} w3!"
    found = measures.passages([text], tokenizer, count=10, longest=60)
    assert [tokenizer.decode(passage.word) for passage in found] == ["w7", "w3"]  # the third does not end in a word
    assert all(passage.context.tolist() == tokenizer(long)["input_ids"] for passage in found)
    assert measures.passages([text], tokenizer, count=10, longest=50) == []  # with its last word, 51 tokens


def test_last_word_accuracy_counts_whole_words() -> None:
    model = tiny.build("llama")
    context = tiny.IDS[0]
    with torch.no_grad():
        first = model(context[None]).logits[0, -1].argmax()[None]
        second = model(torch.cat([context, first])[None]).logits[0, -1].argmax()[None]
    right, wrong = torch.cat([first, second]), torch.cat([first, (second + 1) % 96])
    hidden = [measures.Passage(context, word) for word in (right, wrong, first, (first + 1) % 96)]
    assert measures.last_word_accuracy(model, hidden) == 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_8_bits_a_row_of_outputs(family) -> None:
    model, dense = tiny.build(family), tiny.build(family)
    name, transposed = {
        "llama": ("model.layers.0.mlp.up_proj", False),
        "gpt2": ("transformer.h.0.mlp.c_fc", True),
    }[family]
    saved = measures.round_to_8_bits(model, [name])
    rows, before = (each.get_submodule(name).weight.detach() for each in (model, dense))
    if transposed:
        rows, before = rows.T, before.T
    steps = before.abs().amax(1, keepdim=True) / 127
    assert ((rows / steps) - (rows / steps).round()).abs().max() < 1e-3
    assert ((rows - before).abs() <= steps * 0.5001).all()
    assert saved == rows.numel() - 2 * len(rows)


def test_token_windows_are_full(tokenizer) -> None:
    windows = measures.token_windows([" ".join(WORDS[:15]), " ".join(WORDS[:10])], tokenizer, 10)
    assert windows.tolist()[0] == tokenizer(" ".join(WORDS[:10]))["input_ids"] and windows.shape == (2, 10)
    with pytest.raises(ValueError, match="25 tokens: expected at least one window of 30"):
        measures.token_windows([" ".join(WORDS[:25])], tokenizer, 30)


def test_quality_goes_on_where_it_ended(tmp_path, capsys) -> None:
    folder, tokens, out = tmp_path / "little", tmp_path / "tokens.safetensors", tmp_path / "out"
    tiny.build("llama").save_pretrained(folder)
    save_file({"calibration": tiny.IDS, "heldout": tiny.IDS.flip(1)}, tokens)
    command = ["bench", "quality", f"{folder}@{tokens}", "--rank", "4", "--sparsity", "2:4", "--seeds", "0", "1"]
    command += ["--set", '{"method": "eora"}', "--output", str(out), "--refine"]
    assert main([*command, "none"]) == 0
    first = (out / "results.jsonl").read_text().splitlines()
    refined = [(row["refine"], row["seed"]) for row in map(json.loads, first)]
    assert refined == [("dense", 0), ("8 bits", 0), ("none", 0), ("none", 1)]
    when = os.stat(out / "results.jsonl").st_mtime_ns
    assert main([*command, "none"]) == 0
    assert os.stat(out / "results.jsonl").st_mtime_ns == when
    assert main([*command, "none", "published"]) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert rows[:4] == [json.loads(line) for line in first] and [row["refine"] for row in rows[4:]] == ["published"] * 2
    assert rows[0]["sets"]["heldout"]["gap"] == 0 and rows[0]["bytes"] == 1 and rows[0]["device"]
    assert rows[2]["bytes"] < 1 and rows[1]["sets"]["heldout"]["kl"] < rows[2]["sets"]["heldout"]["kl"]
    assert (out / "results.md").read_text().strip() in capsys.readouterr().out


def test_quality_needs_texts_or_tokens(tmp_path, capsys) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "little")
    tiny_tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tiny_tokenizer.save_pretrained(tmp_path / "little")
    assert main(["bench", "quality", str(tmp_path / "little"), "--output", str(tmp_path / "out")]) == 2
    assert "name texts with --calibration and --eval" in capsys.readouterr().err


def _row(refine: str, seed: int, **gaps: float) -> dict:
    sets = {name: {"perplexity": 10 + gap, "gap": gap, "kl": 0.1, "agreement": 0.9} for name, gap in gaps.items()}
    key = {"model": "m", "calibration": "c", "sparsity": "2:4", "rank": 16, "refine": refine, "seed": seed}
    key["device"] = "cpu"
    return {**key, "bytes": 0.6, "seconds": 1.0, "sets": sets}


def test_shares_are_of_means_over_seeds() -> None:
    rows = [_row("published", 0, a=1.0, b=4.0), _row("published", 1, a=3.0, b=4.0)]
    rows += [_row("tm", 0, a=0.5, b=1.0), _row("tm", 1, a=1.5, b=1.0), _row("tm", 2, a=90.0, b=90.0)]
    text = markdown(rows)
    # sqrt(1/2 * 1/4), over the seeds that both have
    line = "tm: gap 0.354 of published (geometric mean of 2), at most 0.500 (m 2:4 a). By text: a 0.500, b 0.250. Above"
    assert f"{line} 0.85: none." in text
    assert "at most 1.000 (m 2:4 a). By text: a 1.000, b 1.000. Above 0.85: m 2:4 a 1.00, m 2:4 b 1.00." in text
    assert "| m | 2:4 | a |  |  | 2.00 / 0.1000 / 90.0% | 30.67 / 0.1000 / 90.0% | 2-3 |" in text
    assert "| m | 2:4 |  |  | 0.600 / 1 | 0.600 / 1 |" in text


def test_summary_compares_refinements() -> None:
    rows = [_row("none", 0, a=1.0, b=1.0), _row("tm", 0, a=0.8, b=0.95), _row("tm+distill", 0, a=0.4, b=0.96)]
    rows[1]["seconds"], rows[2]["seconds"] = 2.0, 8.0
    text = markdown(rows)
    assert "tm: gap 0.872 of none (geometric mean of 2). Above 0.9: m 2:4 b 0.95." in text
    assert "tm+distill: gap 0.711 of tm (geometric mean of 2). Above 1: m 2:4 b 1.01." in text
    assert "tm: 2.00 x the seconds of none" in text and "tm+distill: 8.00 x the seconds of none" in text


def test_summary_sets_8_bits_beside_the_strongest_refinement() -> None:
    rounded = {**_row("8 bits", 0, a=0.01, b=0.03), "sparsity": "", "bytes": 0.64}
    rows = [rounded, _row("tm", 0, a=9.0), _row("tm+distill", 0, a=0.5), {**_row("tm", 0, a=2.0), "sparsity": "0.7"}]
    rows.append({**_row("tm+distill", 1, a=0.7), "bytes": 0.7, "device": "card"})
    text = markdown(rows)
    assert "8 bits: 0.64 of the bytes, KL 0.1000, gap 0.02 (medians)." in text
    assert "2:4 tm+distill: 0.60 to 0.70 of the bytes, KL 0.1000, gap 0.60 (medians)." in text
    assert "0.7 tm" not in text.split("bytes / last word / seconds")[1]
    assert "Results by device: card 1, cpu 4." in text


def test_seconds_are_compared_on_one_device() -> None:
    rows = [_row("none", 0, a=1.0), _row("none", 1, a=1.0), _row("tm", 0, a=0.8), _row("tm", 1, a=0.8)]
    rows[0]["seconds"], rows[2]["seconds"], rows[3]["device"] = 4.0, 12.0, "card"
    assert "tm: 3.00 x the seconds of none (geometric mean of 1)." in markdown(rows)


def test_a_gap_below_zero_has_no_share() -> None:
    rows = [_row("published", 0, a=-5.0, b=2.0), _row("tm", 0, a=-4.0, b=-1.0)]
    assert "tm: gap 0.100 of published (geometric mean of 1), at most 0.000 (m 2:4 b)." in markdown(rows)


def _command(tmp_path, *more: str) -> list[str]:
    """`bench quality` on a tiny model, into tmp_path / "out"."""
    folder, tokens = tmp_path / "little", tmp_path / "tokens.safetensors"
    tiny.build("llama").save_pretrained(folder)
    save_file({"calibration": tiny.IDS, "heldout": tiny.IDS.flip(1)}, tokens)
    command = ["bench", "quality", f"{folder}@{tokens}", "--rank", "4", *more, "--set", '{"method": "eora"}']
    return [*command, "--output", str(tmp_path / "out"), "--refine", "none"]


def test_processes_share_the_work(tmp_path, capsys) -> None:
    """What another process has in the works is left to it."""
    command, out = _command(tmp_path, "--sparsity", "2:4", "--seeds", "0", "1"), tmp_path / "out"
    with _Results(out).claimed(Cell("little", "tokens", "2:4", 4, "none", 0)) as free:
        assert free and main(command) == 0
    refined = [(row["refine"], row["seed"]) for row in _Results(out).rows()]
    assert refined == [("dense", 0), ("8 bits", 0), ("none", 1)]
    assert main(command) == 0
    assert len(_Results(out).rows()) == 4


def test_a_killed_process_loses_only_its_cell(tmp_path, capsys) -> None:
    """Its lock is free, and a line that it could not finish costs no other result."""
    command, out = _command(tmp_path, "--sparsity", "2:4", "--seeds", "0"), tmp_path / "out"
    results, cell = _Results(out), Cell("little", "tokens", "2:4", 4, "none", 0)
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(out / "locks" / str(cell))], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with results.claimed(cell) as free:
        assert not free
    holder.kill()
    holder.communicate()
    (out / "results.jsonl").write_text('{"model": "little", "calib')
    assert results.rows() == []
    assert main(command) == 0
    assert [row["refine"] for row in results.rows()] == ["dense", "8 bits", "none"]
    assert main(command) == 0
    assert len(results.rows()) == 3


_HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_one_failure_does_not_stop_the_others(tmp_path, capsys) -> None:
    command, out = _command(tmp_path, "--sparsity", "15:30", "2:4", "--seeds", "0"), tmp_path / "out"
    assert main(command) == 2
    assert "1 results are missing. little tokens 15:30 4 none 0" in capsys.readouterr().err
    assert [row["sparsity"] for row in _Results(out).rows()] == ["", "", "2:4"]


def test_columns_that_tell_nothing_are_left_out() -> None:
    rows = [_row("tm", 0, a=1.0), {**_row("tm", 0, a=1.0), "rank": 8}]
    assert "| model | sparsity | rank | text |" in markdown(rows)
    assert "| m | 2:4 | 8 | a |" in markdown(rows) and "| m | 2:4 | 16 | a |" in markdown(rows)
    assert "| model | sparsity | text |" in markdown(rows[:1])
