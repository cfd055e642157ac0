"""Training of the small models that `bench quality` takes."""

import pytest
import torch
from helpers import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_sparselr.bench.families import FAMILIES, reproducibly
from hf_sparselr.cli import main


def test_every_family_learns_and_is_saved(tmp_path, capsys) -> None:
    words = [f"w{index}" for index in range(93)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", "<unk>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    teacher = tmp_path / "teacher"
    tiny.build("llama").save_pretrained(teacher)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(teacher)
    (tmp_path / "text.txt").write_text(" ".join(words[:8] * 40))
    command = ["bench", "families", "--teacher", str(teacher), "--text", f"file:{tmp_path}/text.txt", "--hidden", "32"]
    command += [
        "--layers",
        "1",
        "--batch-size",
        "4",
        "--seq-len",
        "16",
        "--lr",
        "1e-2",
        "--output",
        str(tmp_path / "out"),
    ]
    losses = []
    for steps in ("1", "12"):
        assert main([*command, "--steps", steps, "--families", "opt"]) == 0
        losses.append(float(capsys.readouterr().out.split()[-1]))
        (tmp_path / "out" / "opt" / "config.json").unlink()
    assert losses[1] < losses[0] - 0.3
    assert main([*command, "--steps", "1", "--families", *FAMILIES]) == 0
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(FAMILIES)
    for name in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        assert model(input_ids=tiny.IDS[:1, :16]).logits.shape == (1, 16, 96) and model.dtype == torch.bfloat16
        assert AutoTokenizer.from_pretrained(tmp_path / "out" / name)("w1 w2")["input_ids"] == [4, 5]
    assert main([*command, "--steps", "1", "--families", "opt"]) == 0
    assert capsys.readouterr().out == ""  # it is there
    with pytest.raises(SystemExit):
        main([*command, "--families", "lstm"])


def test_training_is_strict_where_it_can_be() -> None:
    modes = []

    def train(*, least: bool) -> torch.Tensor:
        modes.append(torch.is_deterministic_algorithms_warn_only_enabled())
        assert torch.are_deterministic_algorithms_enabled()
        values = torch.zeros(3)
        return values.put_(torch.tensor([1]), torch.ones(1)) if least else values + 1

    assert reproducibly(lambda: train(least=False)).tolist() == [1, 1, 1] and modes == [False]
    with pytest.warns(UserWarning, match="put_"):
        assert reproducibly(lambda: train(least=True)).tolist() == [0, 1, 0]
    assert modes == [False, False, True] and not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="shape"):
        reproducibly(lambda: torch.zeros(2).view(3))
