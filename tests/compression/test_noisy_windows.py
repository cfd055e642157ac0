"""Calibration windows with random tokens in them."""

import pytest
import torch
from helpers import tiny

from hf_sparselr import compress
from hf_sparselr.compression.noisy_windows import with_noisy_windows
from hf_sparselr.data.model_inputs import token_samples

WINDOWS = torch.randint(3, tiny.VOCAB, (8, 500), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.25, 2), (0.5, 4), (1, 8)])
def test_so_many_noisy_windows_stand_beside_the_others(share: float, count: int) -> None:
    samples = token_samples(WINDOWS)
    found = with_noisy_windows(samples, share, tiny.build("llama"), seed=0)
    assert [sample for sample in found if any(sample is own for own in samples)] == samples
    assert len(found) == len(samples) + count


def test_a_third_of_the_tokens_is_drawn_from_all_others() -> None:
    noisy = with_noisy_windows(token_samples(WINDOWS.clamp(max=20)), 1, tiny.build("llama"), seed=0)[1::2]
    tokens = torch.cat([sample["input_ids"] for sample in noisy])
    replaced = tokens != WINDOWS.clamp(max=20)
    assert 0.27 < float(replaced.float().mean()) < 0.33
    assert set(tokens[replaced].tolist()) == set(range(3, tiny.VOCAB))  # 0 to 2 have roles


def test_tokens_with_a_role_stay() -> None:
    model = tiny.build("llama", image_token_index=50)
    samples = token_samples(torch.where(WINDOWS % 3 == 0, 50, WINDOWS))
    mask = torch.ones_like(samples[0]["input_ids"])
    noisy = with_noisy_windows([{**sample, "attention_mask": mask} for sample in samples], 1, model, seed=0)[1::2]
    for sample, own in zip(noisy, samples, strict=True):
        assert torch.equal(sample["input_ids"] == 50, own["input_ids"] == 50)
        assert sample["attention_mask"] is mask


def test_tokens_without_an_embedding_are_not_drawn() -> None:
    model = tiny.build("llama")
    model.config.vocab_size = 2 * tiny.VOCAB
    noisy = with_noisy_windows(token_samples(WINDOWS), 1, model, seed=0)[1::2]
    assert max(int(sample["input_ids"].max()) for sample in noisy) == tiny.VOCAB - 1


def test_the_seed_decides() -> None:
    model, samples = tiny.build("llama"), token_samples(WINDOWS)
    first, same, other = (with_noisy_windows(samples, 1, model, seed)[1]["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_other_samples_get_no_copy() -> None:
    samples = [{"input_ids": window[None], "pixel_values": torch.ones(1, 3, 4, 4)} for window in WINDOWS]
    assert with_noisy_windows(samples, 1, tiny.build("llama"), seed=0) == samples


@pytest.mark.parametrize("refine", [None, "tm"])
def test_they_bring_a_model_nearer_to_its_dense_self_on_other_text(refine: str | None) -> None:
    narrow = torch.randint(3, 6, (16, 48), generator=torch.Generator().manual_seed(4))
    wide = torch.randint(6, tiny.VOCAB, (8, 48), generator=torch.Generator().manual_seed(5))
    dense = tiny.build("llama")
    settings = {"calibration": narrow, "num_samples": 16, "seq_len": 48, "refine": refine}
    settings["tm"] = {"batch_size": 8, "lr": 3e-4, "relative_lr": False}
    errors = []
    for share in (0.0, 1.0):
        packed = compress(tiny.build("llama"), tiny.settings(**settings, noisy_windows=share))
        with torch.no_grad():
            errors.append(float((packed(wide).logits - dense(wide).logits).square().mean()))
    assert errors[1] < 0.8 * errors[0]
