"""Calibration samples that are no token windows: dicts of model inputs, images, audio."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperFeatureExtractor,
)

from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.data import calibration as cal
from hf_sparselr.data.model_inputs import make_batches

PIXELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(24).view(3, 8)


def load(source, reader=None, num_samples=2, vocab_size=None):
    cal.check_source(source)
    return cal.load_samples(source, reader, num_samples=num_samples, seq_len=6, seed=0, vocab_size=vocab_size)


def equal(samples, expected) -> bool:
    return len(samples) == len(expected) and all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        for mine, theirs in zip(samples, expected, strict=True)
    )


ROWS = [{"pixel_values": PIXELS[row : row + 1]} for row in range(4)]


@pytest.mark.parametrize(
    "source",
    [
        lambda: ROWS,
        lambda: [{"pixel_values": PIXELS}],
        lambda: [{"pixel_values": PIXELS[:3]}, {"pixel_values": PIXELS[3:]}],
        lambda: iter(ROWS),
        lambda: ({"pixel_values": row} for row in (PIXELS[:2], PIXELS[2:])),
        lambda: torch.utils.data.DataLoader([{"pixel_values": row} for row in PIXELS], batch_size=3, collate_fn=None),
        lambda: [{"pixel_values": PIXELS.numpy()}],
    ],
    ids="samples batch batches iterator generator loader numpy".split(),
)
def test_dicts_become_a_sample_a_row(source):
    assert equal(load(source(), num_samples=4), ROWS)
    assert equal(load(source(), num_samples=3), ROWS[:3])


def test_an_iterator_is_read_only_as_far_as_needed():
    items = iter(ROWS)
    load(items, num_samples=2)
    assert torch.equal(next(items)["pixel_values"], PIXELS[2:3])


def test_inputs_of_different_lengths_stay_together():
    """Some models have several images a text: nothing says which rows belong together."""
    item = {"input_ids": IDS[:1], "pixel_values": PIXELS}
    assert equal(load([item], num_samples=1), [item])


def test_token_ids_are_the_special_case():
    windows = [{"input_ids": IDS[row : row + 1, :6]} for row in range(2)]
    assert equal(load(IDS), windows)
    assert equal(load([{"input_ids": IDS}]), windows)
    masked = {"input_ids": IDS, "attention_mask": (IDS < 20).long()}
    assert [sample["input_ids"].shape[1] for sample in load([masked], num_samples=3)] == [6, 6, 4]


def test_a_vocabulary_is_checked_only_where_there_are_ids():
    assert load(ROWS, vocab_size=5)
    assert load(IDS, vocab_size=None)
    for name in ("input_ids", "decoder_input_ids"):
        item = {"pixel_values": PIXELS[:1], name: IDS[:1]}
        assert load([item], num_samples=1, vocab_size=8)
        with pytest.raises(ValueError, match=r"has id 7 in sample 0, outside \[0, vocab_size=7\)"):
            load([item], num_samples=1, vocab_size=7)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (ROWS[:1], ValueError, "has 1 samples, num_samples=2 are needed: pass more, or num_samples=1"),
        ([{"pixel_values": "words"}], ValueError, r"item 0 has keys \['pixel_values'\]: expected tensors"),
        ([{"pixel_values": object()}], TypeError, "item 0: pixel_values is a object, expected a tensor"),
        (
            [{"pixel_values": torch.tensor(1.0)}],
            ValueError,
            "expected tensors with the samples in dimension 0",
        ),
        ([{"pixel_values": PIXELS * float("nan")}], ValueError, "item 0: pixel_values holds NaN or Inf"),
        ([ROWS[0], IDS[0]], TypeError, "at index 1, and a list holds one kind of item"),
        (iter([ROWS[0], IDS[0]]), TypeError, "item 1 is .*, expected a dict as the ones before it"),
    ],
)
def test_errors_name_the_item(source, error, message):
    with pytest.raises(error, match=message):
        load(source)


def test_images_go_through_the_processor():
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    images = [np.full((16, 16, 3), shade, dtype=np.uint8) for shade in (10, 200)]
    expected = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    samples = load(images, processor)
    assert [sample["pixel_values"].shape for sample in samples] == [(1, 3, 8, 8)] * 2
    assert all(torch.equal(s["pixel_values"], e) for s, e in zip(samples, expected, strict=True))
    pil = pytest.importorskip("PIL.Image")
    assert equal(load([pil.fromarray(image) for image in images], processor), samples)
    with pytest.raises(ValueError, match="holds images, and tokenizer=None: pass the model's processor"):
        load(images)


def test_audio_goes_through_the_feature_extractor():
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    sounds = [np.sin(np.arange(4000) / pitch).astype(np.float32) for pitch in (5, 9)]
    expected = [extractor(sound, sampling_rate=16000, return_tensors="pt")["input_features"] for sound in sounds]
    for reader in (extractor, SimpleNamespace(feature_extractor=extractor)):
        samples = load(sounds, reader)
        assert all(torch.equal(s["input_features"], e) for s, e in zip(samples, expected, strict=True))


def llava_processor() -> LlavaProcessor:
    tokens = tiny.tokenizer()
    tokens.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    template = (
        "{% for m in messages %}{% for part in m.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    return LlavaProcessor(images, tokens, patch_size=4, vision_feature_select_strategy="full", chat_template=template)


def test_chats_with_images_go_through_the_template_of_the_processor():
    image = pytest.importorskip("PIL.Image").new("RGB", (8, 8), (200, 10, 10))
    words = ("describe it", "and what is this one")
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for text in words
    ]
    processor = llava_processor()
    assert cal.reader_of(chats) == "processor"
    for sample, text in zip(load(chats, processor, vocab_size=4097), words, strict=True):
        assert sample["pixel_values"].shape == (1, 3, 8, 8)
        ids = sample["input_ids"][0].tolist()
        assert ids[4:] == processor.tokenizer(text).input_ids and set(ids[:4]) == {4096}
    plain = [[{"role": "user", "content": [{"type": "text", "text": "only words"}]}]]
    assert cal.reader_of(plain) == "tokenizer"


def test_a_processor_may_stand_for_the_tokenizer():
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
    models = [tiny.build("llama", vocab_size=4097) for _ in range(2)]
    for model, reader in zip(models, (llava_processor(), llava_processor().tokenizer), strict=True):
        compress(model, tiny.settings(calibration=texts, tokenizer=reader))
    assert tiny.same(*map(tiny.snapshot, models))


def test_images_compress_a_vision_model(tmp_path):
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    ViTForImageClassification._from_config(config).save_pretrained(tmp_path / "dense")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "dense")
    images = [np.full((16, 16, 3), shade, dtype=np.uint8) for shade in (10, 90, 170, 250)]
    model = compress(str(tmp_path / "dense"), tiny.settings(calibration=images), tmp_path / "packed")
    again = ViTForImageClassification.from_pretrained(tmp_path / "packed")
    pixels = ViTImageProcessor.from_pretrained(tmp_path / "packed")(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, again(pixels).logits)


def test_the_reader_of_a_source():
    image, sound = np.zeros((2, 2, 3), dtype=np.uint8), np.zeros(3)
    readers = {
        "tokenizer": ["file:a", "org/name", ["text"], [[{"role": "user", "content": "hi"}]]],
        "processor": [[image], [sound]],
        None: [IDS, list(IDS), [[1, 2]], ROWS, iter(ROWS), [{"input_ids": IDS}]],
    }
    for reader, sources in readers.items():
        assert [cal.reader_of(source) for source in sources] == [reader] * len(sources)


def test_the_config_takes_them():
    for source in (ROWS, iter(ROWS), [np.zeros((2, 2, 3), dtype=np.uint8)], [np.zeros(3)]):
        assert SparseLRConfig(calibration=source).to_dict()["calibration"] == cal.CUSTOM


def test_batches_join_equal_shapes_alone():
    wide = {"pixel_values": torch.zeros(1, 3, 8, 16)}
    batches = make_batches([*ROWS, wide, ROWS[0]], 3)
    assert [len(batch["pixel_values"]) for batch in batches] == [3, 1, 1, 1]
    assert torch.equal(batches[0]["pixel_values"], PIXELS[:3])
