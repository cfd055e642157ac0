"""Training of the small models that `bench quality` takes."""

import pytest
import torch
from helpers import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_sparselr.bench.families import FAMILIES
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
