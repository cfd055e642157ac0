"""The coverage command: its inputs and outcomes on a few types; a sample over all classes is slow."""

import os
import time

import pytest
import torch
import transformers as tf

from model_coverage import run
from model_coverage.inputs import find_inputs
from model_coverage.run import sampled, try_in_fork, try_in_forks, types_of
from model_coverage.steps import build
from model_coverage.table import MARKS, write_table
from model_coverage.tiny_configs import SPECIAL, VOCAB, Sizes, tiny_config

PER_CLASS = 2
CLASSES = ["causal-lm", "encoder", "seq2seq", "sequence-classification", "image", "speech", "vision-language"]


def test_a_config_is_shrunk_with_its_nested_ones():
    config = tiny_config(tf.LlavaConfig, Sizes())
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (64, 64)
    assert config.text_config.num_hidden_layers == config.vision_config.num_hidden_layers == 2
    assert SPECIAL < config.image_token_id < config.text_config.vocab_size == VOCAB


def test_images_have_as_many_tokens_as_features():
    make, draw = build(tf.LlavaConfig, tf.LlavaForConditionalGeneration)
    inputs, model = draw(0), make()
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == sum(len(rows) for rows in features)


def test_a_seed_draws_the_same_inputs():
    draw = find_inputs(build(tf.WhisperConfig, tf.WhisperForConditionalGeneration)[0](), 2)
    assert all(torch.equal(value, draw(3)[name]) for name, value in draw(3).items())
    assert not torch.equal(draw(3)["input_features"], draw(4)["input_features"])


def test_a_type_passes():
    assert try_in_fork("causal-lm", "llama")["outcome"] == "passes"


def test_a_hang_and_a_crash_are_accidents_of_their_step(monkeypatch):
    def hang(config_class, model_class, on_step):
        on_step("save")
        time.sleep(60)

    def crash(config_class, model_class, on_step):
        os._exit(3)

    monkeypatch.setattr(run, "try_type", hang)
    late = try_in_fork("causal-lm", "llama", time_limit=1)
    assert (late["outcome"], late["step"], late["error"]) == ("accident", "save", "no answer after 1 s")
    monkeypatch.setattr(run, "try_type", crash)
    found = list(try_in_forks([("causal-lm", "llama"), ("image", "vit"), ("encoder", "bert")], 2))
    assert {pair for pair, _ in found} == {("causal-lm", "llama"), ("image", "vit"), ("encoder", "bert")}
    assert {(row["outcome"], row["error"]) for _, row in found} == {("no tiny model", "the process died")}


def test_a_table_replaces_the_one_before(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    error = {"outcome": "accident", "step": "run", "error": "ValueError: layer 3 of LlamaModel", "where": ""}
    write_table(page, {"encoder": {"a": error, "b": {"outcome": "passes", "share": 1.0}}}, {"encoder": 7})
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| encoder | 7 | 2 | 2 | 1 (50%) | 0 (0%) | 1 (50%) | 0 |" in text
    assert "| 1 | run | ValueError: layer N of &lt;Class> | a |" in text


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model_type"), sampled(CLASSES, PER_CLASS))
def test_a_type_has_no_accident(task, model_type):
    assert model_type in types_of(task)
    outcome = try_in_fork(task, model_type)
    assert outcome["outcome"] != "accident", outcome
