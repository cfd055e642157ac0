import copy
import random
from pathlib import Path

import datasets
import pytest
import torch
from helpers.paths import PYLM as MODEL
from helpers.tiny import with_bos
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparselr.data import calibration as cal
from hf_sparselr.data import sources, windows
from hf_sparselr.data.self_generation import sample_from_model
from hf_sparselr.utils.public_names import public_source

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}] for text in TEXTS]
IDS = torch.arange(40).view(5, 8)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load(source, tokenizer=None, num_samples=4, seq_len=16, seed=0, vocab_size=4096):
    return cal.load_windows(
        source, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, vocab_size=vocab_size
    )


def sample(model, bos_id=None, num_samples=3, seq_len=12, seed=0, **kwargs):
    return sample_from_model(model, bos_id, num_samples=num_samples, seq_len=seq_len, seed=seed, **kwargs)


def lists(windows):
    return [window.tolist() for window in windows]


def stream(texts, tokenizer):
    return [t for text in texts for t in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]


def chunks(ids, size=16):
    return [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]


def guarded(rows):
    """A generator that fails when it is read past its rows."""
    yield from rows
    raise AssertionError("read too far")


# --- check_source and the published name ---------------------------------------------------------------------


def test_the_name_of_a_source_is_published_only_if_it_is_public():
    assert (public_source("self"), public_source("me/texts:part")) == ("self", "me/texts:part")
    assert public_source("file:a/*.py") == public_source(TEXTS) == public_source(IDS) == cal.CUSTOM


@pytest.mark.parametrize(
    "source",
    [
        "self",
        "file:some dir/**/*.txt",
        sources.C4,
        "wikitext",
        "org/name:config-1.0",
        TEXTS,
        tuple(TEXTS),
        CHATS,
        IDS,
        list(IDS),
        [[1, 2, 3]],
        [{"input_ids": IDS}],
        [IDS.numpy()],
        datasets.Dataset.from_dict({"text": TEXTS}),
        datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        torch.utils.data.DataLoader(IDS),
    ],
    ids=lambda source: cal._show(source)[:40],
)
def test_check_source_accepts(source):
    assert cal.check_source(source) is None


@pytest.mark.parametrize("source", [None, 3, b"text", {"input_ids": IDS}, Path("a.txt"), len])
def test_check_source_rejects_other_types(source):
    with pytest.raises(TypeError, match=f"calibration=<{type(source).__name__}.* is not calibration data: pass"):
        cal.check_source(source)


@pytest.mark.parametrize("source", ["", " ", "file:", "file: ", "a/b/c", "/a/b", "./a", "id:", "x = 1\n" * 50])
def test_check_source_rejects_malformed_strings(source):
    with pytest.raises(ValueError, match=r"calibration='.* names no source: pass") as error:
        cal.check_source(source)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("source", [[], (), torch.empty(0, 4).long(), datasets.Dataset.from_dict({"text": []})])
def test_check_source_rejects_empty(source):
    with pytest.raises(ValueError, match="calibration=<"):
        cal.check_source(source)


@pytest.mark.parametrize(
    "source",
    [
        ["a", IDS[0]],
        [IDS[0], "a"],
        [CHATS[0], "a"],
        ["a", None],
        [[]],
        [CHATS[0], []],
        [3, 4],
        CHATS[0],
        [[0.5]],
    ],
)
def test_check_source_rejects_mixed_lists(source):
    with pytest.raises(TypeError, match=r"calibration=<list> has .* at index [01]"):
        cal.check_source(source)


def test_check_source_rejects_tensors_of_wrong_dtype_or_shape():
    for wrong in (IDS.float(), IDS.bool(), [IDS[0], IDS[1].half()]):
        with pytest.raises(ValueError, match=r"calibration=.* not integer token ids"):
            cal.check_source(wrong)
    for wrong in (IDS[0], IDS[None], IDS[:, :1], [IDS[None]], [IDS[0], IDS[0, :1]]):
        with pytest.raises(ValueError, match=r"calibration=.* has shape"):
            cal.check_source(wrong)


def test_check_source_leaves_an_iterator_unread():
    source = iter(IDS)
    cal.check_source(source)
    assert len(list(source)) == 5


def test_missing_column_lists_the_columns():
    data = datasets.Dataset.from_dict({"content": TEXTS, "n": list(range(60))})
    with pytest.raises(ValueError, match=r"columns \['content', 'n'\]: rename one to messages or input_ids or"):
        cal.check_source(data)
    streamed = datasets.IterableDataset.from_generator(lambda: iter([{"content": "a"}]))
    assert streamed.column_names is None
    with pytest.raises(ValueError, match=r"columns \['content'\]"):
        load(streamed)


# --- texts, files, chats -----------------------------------------------------------------------------------


def test_texts_are_cut_into_distinct_windows_of_one_stream(tokenizer):
    windows = load(TEXTS, tokenizer, num_samples=20)
    assert all(w.dtype == torch.int64 and w.shape == (16,) and w.device.type == "cpu" for w in windows)
    everything = chunks(stream(TEXTS, tokenizer))
    assert lists(windows) != everything[:20]
    positions = [everything.index(window) for window in lists(windows)]
    assert len(set(positions)) == 20 and positions != sorted(positions)


def test_all_windows_can_be_drawn(tokenizer):
    everything = chunks(stream(TEXTS, tokenizer))
    windows = load(TEXTS, tokenizer, num_samples=len(everything))
    assert sorted(lists(windows)) == sorted(everything)


def test_seed_decides_the_draw(tokenizer):
    torch.manual_seed(1), random.seed(1)
    first = lists(load(TEXTS, tokenizer))
    torch.manual_seed(2), random.seed(2)
    assert lists(load(TEXTS, tokenizer)) == first
    assert lists(load(TEXTS, tokenizer, seed=1)) != first


def test_without_eos_a_blank_line_ends_a_text(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    (window,) = load(["a", "b"], tokenizer, num_samples=1, seq_len=4)
    assert tokenizer.decode(window) == "a\n\nb\n\n"


def test_files(tmp_path, tokenizer):
    (tmp_path / "sub").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / ("sub" if index % 2 else ".") / f"{index:02}.py").write_text(text, encoding="utf-8")
    (tmp_path / "empty.py").touch()
    windows = load(f"file:{tmp_path}/**/*.py", tokenizer)
    ordered = TEXTS[::2] + TEXTS[1::2]
    assert all(window in chunks(stream(ordered, tokenizer)) for window in lists(windows))
    with pytest.raises(ValueError, match=r"calibration='file:.*\.txt' matches no file: pass"):
        load(f"file:{tmp_path}/*.txt", tokenizer)
    (tmp_path / "latin.py").write_bytes(b"\xe9\xff")
    with pytest.raises(ValueError, match=r"latin\.py is not UTF-8"):
        load(f"file:{tmp_path}/**/*.py", tokenizer)


def test_chats_go_through_the_template(tokenizer, chat_tokenizer):
    ids = tokenizer("".join(f"<user>{text}\n<assistant>ok\n" for text in TEXTS[:1])).input_ids
    assert lists(load(CHATS[:1], chat_tokenizer, num_samples=1, seq_len=len(ids))) == [ids]
    with pytest.raises(ValueError, match=r"calibration=<list> holds chats: set tokenizer\.chat_template"):
        load(CHATS, tokenizer)


@pytest.mark.parametrize("source", [TEXTS, CHATS, "org/name", sources.C4], ids=["texts", "chats", "hub", "c4"])
def test_text_needs_a_tokenizer(source):
    with pytest.raises(ValueError, match=r"calibration=.* is text, and tokenizer=None: pass"):
        load(source)


def test_too_little_text(tokenizer):
    total = len(stream(TEXTS, tokenizer))
    message = f"{total} tokens, num_samples=999 of seq_len=16 need {999 * 16}: .* num_samples={total // 16}$"
    with pytest.raises(ValueError, match=message):
        load(TEXTS, tokenizer, num_samples=999)
    with pytest.raises(ValueError, match="pass more text, or a smaller seq_len"):
        load(TEXTS, tokenizer, seq_len=total + 1)
    with pytest.raises(ValueError, match="calibration=<list> has 0 tokens"):
        load(["", " \n"], tokenizer)


def test_self_is_not_loaded():
    with pytest.raises(ValueError, match="calibration='self' holds no data: call sample_from_model"):
        load("self")


# --- data sets ---------------------------------------------------------------------------------------------


def test_dataset_text_and_messages(tokenizer, chat_tokenizer):
    data = datasets.Dataset.from_dict({"text": [*TEXTS, None, ""]})
    first = lists(load(data, tokenizer))
    assert lists(load(data, tokenizer)) == first != lists(load(data, tokenizer, seed=1))
    data = datasets.Dataset.from_dict({"messages": CHATS, "text": ["x"] * 60})
    assert "<assistant>ok" in "".join(map(chat_tokenizer.decode, load(data, chat_tokenizer)))


def test_dataset_is_read_only_as_far_as_needed(tokenizer):
    features = datasets.Features(text=datasets.Value("string"))
    rows = tuple({"text": text} for text in TEXTS * 10)  # a list would be split into shards
    streamed = datasets.IterableDataset.from_generator(guarded, features, gen_kwargs={"rows": rows})
    assert all(len(window) == 16 for window in load(streamed, tokenizer, num_samples=2))


def test_streamed_dataset_with_unknown_columns_keeps_its_first_row(tokenizer):
    streamed = datasets.IterableDataset.from_generator(lambda: iter([{"text": text} for text in TEXTS]))
    assert lists(load(streamed, tokenizer)) == lists(load(TEXTS, tokenizer))


@pytest.mark.parametrize("format", [None, "torch"])
def test_dataset_input_ids(format):
    data = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "text": ["x"] * 5}).with_format(format)
    assert lists(load(data)) == IDS[:4].tolist()


def test_hub_without_network(monkeypatch, tokenizer, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for source in (sources.C4, "no-such-org/no-such-set:config"):
        message = f'calibration=\'{source}\': .* cannot be loaded .*: pass calibration="self", "file:GLOB"'
        with pytest.raises(OSError, match=message) as error:
            load(source, tokenizer)
        assert error.value.__cause__ is not None


def test_c4_windows_come_from_long_documents(tokenizer):
    documents = [TEXTS[0], "".join(TEXTS[:20]), "".join(TEXTS[20:])]
    draw = windows.Draw("calibration='allenai/c4'", tokenizer, 6, 64, 0)
    drawn = lists(windows.windows_of_documents(documents, draw))
    ids_of = [tokenizer(document).input_ids for document in documents[1:]]
    assert all(any(w in (ids[i : i + 64] for i in range(len(ids))) for ids in ids_of) for w in drawn)
    assert lists(windows.windows_of_documents(documents, draw)) == drawn
    assert lists(windows.windows_of_documents(documents, windows.Draw("", tokenizer, 6, 64, 1))) != drawn


# --- special tokens ----------------------------------------------------------------------------------------


def test_windows_begin_with_bos_where_texts_do(tokenizer):
    bos = with_bos(tokenizer)
    found = lists(load(TEXTS, bos, num_samples=20, seq_len=17))
    plain = lists(load(TEXTS, tokenizer, num_samples=20, seq_len=16))
    assert found == [[bos.bos_token_id, *window] for window in plain]
    document = "".join(TEXTS)
    draw = windows.Draw("", bos, 4, 64, 0)
    for window in lists(windows.windows_of_documents([document], draw)):
        assert len(window) == 64 and window[0] == bos.bos_token_id
        assert tokenizer.decode(window[1:]) in document


def test_a_template_that_writes_bos_gets_no_second_one(tokenizer):
    bos = with_bos(tokenizer)
    bos.chat_template = "{{ bos_token }}" + TEMPLATE
    (window,) = lists(load(CHATS[:1], bos, num_samples=1, seq_len=8))
    assert window[0] == bos.bos_token_id != window[1]


def test_special_tokens_at_the_start(tokenizer):
    assert windows.start_ids(tokenizer) == []
    assert windows.start_ids(with_bos(tokenizer)) == [tokenizer.bos_token_id]
    suffixed = copy.deepcopy(tokenizer)
    suffixed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} {tokenizer.bos_token} $A {tokenizer.eos_token}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token,)],
    )
    assert windows.start_ids(suffixed) == [tokenizer.bos_token_id] * 2
    with pytest.raises(ValueError, match="seq_len=2: expected at least 3, as windows begin with special"):
        load(TEXTS, suffixed, seq_len=2)


def test_c4_without_a_long_document(tokenizer):
    draw = windows.Draw("calibration='allenai/c4'", tokenizer, 2, 64, 0)
    with pytest.raises(ValueError, match="calibration='allenai/c4' gave 0 of 2 documents of over seq_len=64 tokens"):
        windows.windows_of_documents(TEXTS[:2], draw)


# --- token ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        IDS,
        IDS.to(torch.int32),
        IDS.tolist(),
        list(IDS),
        [IDS[:2], IDS[2], IDS[3:]],
        [{"input_ids": IDS}],
        IDS.numpy(),
        torch.utils.data.DataLoader(IDS, batch_size=2),
    ],
    ids=["tensor", "int32", "lists", "rows", "mixed-rank", "dicts", "numpy", "loader"],
)
def test_token_ids_are_taken_in_order(source):
    windows = load(source)
    assert lists(windows) == IDS[:4].tolist()
    assert all(w.dtype == torch.int64 for w in windows)
    assert lists(load(source, seq_len=3)) == IDS[:4, :3].tolist()


def test_rows_may_differ_in_length():
    assert [len(w) for w in load([IDS[0], IDS[1, :5], IDS[2, :2]], num_samples=3, seq_len=6)] == [6, 5, 2]


def test_windows_do_not_alias_the_source():
    source = IDS.clone()
    load(source)[0].fill_(7)
    assert torch.equal(source, IDS)


def test_generator_is_consumed_once_and_no_further_than_needed():
    assert lists(load(guarded(IDS[:4]))) == IDS[:4].tolist()


def test_padding_is_dropped():
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    windows = load([{"input_ids": IDS, "attention_mask": mask}])
    assert windows[0].tolist() == IDS[0, 3:].tolist() and lists(windows[1:]) == IDS[1:4].tolist()


def test_too_few_samples():
    with pytest.raises(ValueError, match=r"has 5 samples, 40 tokens; num_samples=6 .* num_samples=5$"):
        load(iter(IDS), num_samples=6)


@pytest.mark.parametrize("wrong", [-1, 30])
def test_id_outside_the_vocabulary(wrong):
    ids = torch.zeros(4, 8, dtype=torch.int64)
    ids[2, 5] = wrong
    message = rf"calibration=<Tensor.*> has id {wrong} in sample 2, outside \[0, vocab_size=30\): pass"
    with pytest.raises(ValueError, match=message):
        load(ids, vocab_size=30)


def test_foreign_tokenizer(tokenizer):
    with pytest.raises(ValueError, match="or a tokenizer, that belong to the model"):
        load(TEXTS, tokenizer, vocab_size=10)


def test_bad_items_of_an_iterable():
    for item, error, message in [
        (IDS[0].float(), ValueError, "item 0 holds torch.float32"),
        (IDS[0, :1], ValueError, "item 0 has shape"),
        (IDS[None], ValueError, "item 0 has shape"),
        ("some text", TypeError, "item 0 is 'some text', not a tensor of token ids"),
        ({"labels": IDS[0]}, TypeError, "item 0 is .*, not a tensor of token ids"),
        ([[1, 2], [3]], TypeError, "item 0 is .*, not a tensor of token ids"),
    ]:
        with pytest.raises(error, match=f"calibration=<list_iterator> {message}"):
            load(iter([item]))


# --- self --------------------------------------------------------------------------------------------------


def test_model_writes_full_windows(model, tokenizer):
    windows = sample(model, tokenizer.bos_token_id, num_samples=5, seq_len=64, batch_size=2)
    assert len(windows) == 5
    assert all(w.dtype == torch.int64 and w.shape == (64,) for w in windows)
    assert all(w[0] == tokenizer.bos_token_id for w in windows)
    assert all((w[1:] != tokenizer.eos_token_id).all() for w in windows)
    assert len({tuple(w.tolist()) for w in windows}) == 5


def test_model_samples_depend_on_the_seed_alone(model, tokenizer):
    first = lists(sample(model, tokenizer.bos_token_id))
    torch.manual_seed(5)
    assert lists(sample(model, tokenizer.bos_token_id)) == first == lists(sample(model))
    assert lists(sample(model, tokenizer.bos_token_id, seed=1)) != first


def test_model_and_random_state_are_left_alone(model):
    model.train()
    model.model.layers[0].eval()
    own, before = model.generation_config, copy.deepcopy(model.generation_config)
    state = torch.get_rng_state()
    sample(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].mlp.training
    assert model.generation_config is own and own.to_dict() == before.to_dict()
    model.eval()


def test_model_state_is_restored_after_a_failure(model):
    model.train()
    own, state = model.generation_config, torch.get_rng_state()
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model)
    handle.remove()
    assert model.training and model.generation_config is own and torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_own_generation_config_does_not_shape_the_samples(model):
    plain, own = lists(sample(model)), model.generation_config
    model.generation_config = copy.deepcopy(own)
    model.generation_config.update(top_k=1, do_sample=True, repetition_penalty=5.0)
    try:
        assert lists(sample(model)) == plain
    finally:
        model.generation_config = own


def test_without_bos_samples_start_from_random_ids(model):
    own = model.generation_config
    model.generation_config = copy.deepcopy(own)
    model.generation_config.bos_token_id = None
    try:
        first = lists(sample(model))
        assert len({ids[0] for ids in first}) > 1
        assert lists(sample(model)) == first
        assert [ids[0] for ids in lists(sample(model, seed=1))] != [ids[0] for ids in first]
    finally:
        model.generation_config = own


def test_models_that_cannot_write():
    tiny = {"vocab_size": 16, "num_hidden_layers": 1}
    no_head = LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, **tiny))
    seq2seq = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=16))
    for model in (no_head, seq2seq, torch.nn.Linear(2, 2)):
        message = f'calibration="self": {type(model).__name__} is no decoder .*: pass "file:GLOB"'
        with pytest.raises(ValueError, match=message):
            sample(model)
