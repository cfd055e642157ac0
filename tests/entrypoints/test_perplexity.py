import math
from pathlib import Path

import datasets
import pytest
import torch
from helpers.paths import PYLM
from helpers.tiny import build, with_bos
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparselr.data import calibration
from hf_sparselr.entrypoints.perplexity import perplexity

VOCAB = 4096
TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(8)]
IDS = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PYLM)


@pytest.fixture(scope="module")
def model():
    return build("llama", vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)


@torch.no_grad()
def log_likelihoods(model, ids: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, in float64."""
    logits = model(input_ids=ids[None]).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


def reference(model, windows: list[torch.Tensor]) -> float:
    scores = torch.cat([log_likelihoods(model, window) for window in windows if len(window) > 1])
    return math.exp(-scores.mean())


def sliding_reference(model, ids: torch.Tensor, length: int, stride: int) -> float:
    """Every token once, in the first window that reaches it."""
    scores, start = {}, 0
    while True:
        for position, score in enumerate(log_likelihoods(model, ids[start : start + length]), start + 1):
            scores.setdefault(position, float(score))
        if start + length >= len(ids):
            return math.exp(-sum(scores.values()) / len(scores))
        start += stride


def close(value: float):
    return pytest.approx(value, rel=1e-5)


def test_trained_model_predicts_python(tokenizer):
    trained = AutoModelForCausalLM.from_pretrained(PYLM, dtype=torch.float32)
    text = Path(calibration.__file__).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][: 4 * 256]
    value = perplexity(trained, text, tokenizer, seq_len=256, max_windows=4, batch_size=2)
    assert value == close(reference(trained, ids.split(256)))
    assert value < 60


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_text_is_cut_into_windows(model, tokenizer, batch_size):
    ids = tokenizer("\n\n".join(TEXTS), return_tensors="pt")["input_ids"][0]
    assert len(ids) % 16 > 1
    value = perplexity(model, TEXTS, tokenizer, seq_len=16, batch_size=batch_size)
    assert isinstance(value, float)
    assert value == close(reference(model, ids.split(16)))


def test_a_last_window_of_one_token_scores_nothing(model, tokenizer):
    text = "\n\n".join(TEXTS)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    length = next(n for n in range(8, 64) if len(ids) % n == 1)
    assert perplexity(model, text, tokenizer, seq_len=length) == close(reference(model, ids.split(length)))


@pytest.mark.parametrize("stride", [1, 5, 15, 16])
def test_overlapping_windows_score_only_new_tokens(model, tokenizer, stride):
    text = "\n\n".join(TEXTS[:3])
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    value = perplexity(model, text, tokenizer, seq_len=16, stride=stride)
    expected = sliding_reference(model, ids, 16, stride) if stride < 16 else reference(model, ids.split(16))
    assert value == close(expected)


@pytest.mark.parametrize("stride", [None, 5])
def test_windows_begin_with_bos_where_texts_do(model, tokenizer, stride):
    """As lm-eval rolls: BOS in front of every window, all tokens of text scored once."""
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"][0]
    bos = with_bos(tokenizer)
    assert len(bos(TEXTS[0])["input_ids"]) == len(ids) + 1
    value = perplexity(model, TEXTS[0], bos, seq_len=11, stride=stride)
    parts = [ids[start : start + 10] for start in range(0, len(ids), stride or 10)]
    scores, reached = [], 0
    for start, part in zip(range(0, len(ids), stride or 10), parts, strict=True):
        window = torch.cat([torch.tensor([bos.bos_token_id]), part])
        scores += log_likelihoods(model, window)[reached - start :].tolist()
        reached = start + len(part)
    assert len(scores) == len(ids)
    assert value == close(math.exp(-sum(scores) / len(scores)))


def test_windows_are_bounded_by_the_context(model, tokenizer):
    context = model.config.max_position_embeddings
    value = perplexity(model, TEXTS, tokenizer)
    assert value == perplexity(model, TEXTS, tokenizer, seq_len=context)
    assert value != close(perplexity(model, TEXTS, tokenizer, seq_len=context // 2))


def test_token_ids_are_windows(model):
    expected = close(reference(model, list(IDS)))
    assert perplexity(model, IDS) == expected
    assert perplexity(model, list(IDS.int()), batch_size=2) == expected
    uneven = [IDS[0], IDS[1, :5], IDS[2, :5]]
    assert perplexity(model, uneven) == close(reference(model, uneven))
    assert perplexity(model, IDS, max_windows=2) == close(reference(model, list(IDS[:2])))


def test_all_sources_of_text_agree(model, tokenizer, tmp_path, monkeypatch):
    expected = perplexity(model, "\n\n".join(TEXTS), tokenizer, seq_len=32)
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8")
    rows = datasets.Dataset.from_dict({"text": [*TEXTS, None]})
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for data in (TEXTS, f"file:{tmp_path}/*.txt", rows, rows.to_iterable_dataset(), "org/name:part", "name"):
        assert perplexity(model, data, tokenizer, seq_len=32) == expected
    assert asked == [(("org/name", "part"), {"split": "test"}), (("name", None), {"split": "test"})]


def test_training_flags_and_gradients_are_left_alone(model):
    model.train()
    model.lm_head.eval()
    try:
        assert perplexity(model, IDS) == close(reference(model, list(IDS)))
        assert model.training and model.model.training and not model.lm_head.training
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()


def test_half_precision_logits_are_scored_in_float32(model):
    half = build("llama", torch.bfloat16, vocab_size=VOCAB)
    assert perplexity(half, IDS) == close(reference(half, list(IDS)))


def test_an_unbounded_loss_is_infinite():
    hopeless = build("llama", vocab_size=VOCAB)
    with torch.no_grad():
        hopeless.lm_head.weight.mul_(1e6)
    assert perplexity(hopeless, IDS) == math.inf


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ("some text", {"tokenizer": None}, ValueError, "tokenizer=None: data are text"),
        ("", {}, ValueError, "data='' holds no text: pass a text"),
        ([" ", "\n"], {}, ValueError, "holds no text"),
        ([], {}, ValueError, r"data=\[\] holds no text"),
        (["text", 1], {}, TypeError, r"data=\['text', 1\]: pass a text"),
        (7, {}, TypeError, "data=7: pass a text"),
        (["a"], {}, ValueError, "data='a' has 1 tokens: expected at least 2"),
        ("file:/none/*.txt", {}, ValueError, "data='file:/none/.*' matches no file"),
        (
            datasets.Dataset.from_dict({"body": ["a"]}),
            {},
            ValueError,
            r"has columns \['body'\]: rename one to text",
        ),
        ("a text", {"seq_len": 1}, ValueError, "seq_len=1: expected an integer >= 2"),
        ("a text", {"batch_size": 0}, ValueError, "batch_size=0: expected"),
        ("a text", {"max_windows": 0}, ValueError, "max_windows=0: expected"),
        ("a text", {"stride": 0}, ValueError, "stride=0: expected an integer >= 1"),
        ("a text", {"stride": 1.5}, TypeError, "stride=1.5: expected an integer"),
        (
            "a text",
            {"stride": 9, "seq_len": 8},
            ValueError,
            r"stride=9: expected an integer in 1\.\.8, the tokens of text in a window",
        ),
        ("a text", {"stride": 65}, ValueError, r"stride=65: expected an integer in 1\.\.64, the tokens"),
        (IDS, {"stride": 4}, ValueError, "stride=4: data are token ids, .* expected None"),
        (IDS.float(), {}, ValueError, "data item 0 holds torch.float32, not integer token ids"),
        ([IDS[0], "text"], {}, TypeError, "data item 1 is 'text', not a tensor of token ids: pass integers"),
        ([IDS[0, :1]], {}, ValueError, "data item 0 has shape"),
        (IDS + VOCAB, {}, ValueError, rf"data has id \d+ in window 0, outside \[0, vocab_size={VOCAB}\)"),
        (IDS.repeat(1, 6), {}, ValueError, "data has a window of 72 tokens: expected at most the model's 64"),
    ],
)
def test_errors_name_the_argument(model, tokenizer, data, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(model, data, **{"tokenizer": tokenizer, **options})


def test_a_data_set_that_cannot_be_loaded(model, tokenizer, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"data='org/name': the test split .* cannot be loaded \(no network\): pass \"file:GLOB\""
    with pytest.raises(OSError, match=message):
        perplexity(model, "org/name", tokenizer)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_only_causal_language_models(name):
    with pytest.raises(TypeError, match=r"model=<\w+>: expected a causal language model"):
        perplexity(build(name), IDS)
