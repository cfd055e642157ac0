"""What transformers' generation modes make of a packed model: the tokens of plain greedy decoding."""

import copy
import importlib.util

import pytest
import torch
from helpers import tiny
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from hf_sparselr import compress

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LENGTHS = (32, 20, 7, 1)
PROMPTS = [row[:length].tolist() for row, length in zip(tiny.IDS, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def dense():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    compress(tiny.build("llama"), tiny.settings(overrides={"k_proj": {"rank": 0}})).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def dequantized(packed):
    """The packed model with dense weights."""
    return copy.deepcopy(packed).dequantize()


@pytest.fixture(scope="module")
def expected(packed):
    """The tokens that follow each prompt, decoded alone and without a cache."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(GREEDY["max_new_tokens"]):
            with torch.no_grad():
                ids = torch.cat([ids, packed(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def singly(model, **kwargs):
    """The tokens that `generate` adds to each prompt alone."""
    found = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt], device=model.device), **GREEDY, **kwargs)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def test_left_padded_batches_equal_single_prompts(packed, expected):
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in LENGTHS])
    found = packed.generate(ids, attention_mask=mask, **GREEDY)
    assert found[:, width:].tolist() == expected


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(packed, expected, cache):
    assert singly(packed, cache_implementation=cache) == expected


@pytest.mark.gpu  # transformers offloads caches from CUDA only
@pytest.mark.parametrize(
    "cache",
    [
        pytest.param("offloaded", marks=pytest.mark.skip(reason="transformers 5.17 gives other tokens, dense too")),
        pytest.param("offloaded_static", marks=pytest.mark.skip(reason="torch 2.11 crashes in Dynamo, dense too")),
    ],
)
def test_offloaded_caches(packed, cache):
    model = copy.deepcopy(packed).cuda()
    assert singly(model, cache_implementation=cache) == singly(model)


@pytest.mark.skipif(not importlib.util.find_spec("hqq"), reason="quantised caches need hqq")
def test_a_quantised_cache_decodes_as_for_the_dense_model(packed, dequantized):
    options = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "hqq", "nbits": 8, "q_group_size": 8},
    }
    assert singly(packed, **options) == singly(dequantized, **options)


def test_generate_batch_equals_generate(packed, expected):
    config = GenerationConfig(**GREEDY)
    blocks = ContinuousBatchingConfig(block_size=16, num_blocks=32, max_batch_tokens=64)
    outputs = packed.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=blocks)
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [found[tuple(prompt)] for prompt in PROMPTS] == expected


def test_a_packed_model_drafts_for_the_dense_one(packed, dense):
    assert singly(dense, assistant_model=packed) == singly(dense)


def test_a_dense_model_drafts_for_the_packed_one(packed, dense, expected):
    assert singly(packed, assistant_model=dense) == expected


def test_prompt_lookup(packed, expected):
    assert singly(packed, prompt_lookup_num_tokens=3) == expected


def test_beams(packed, dequantized):
    assert singly(packed, num_beams=3) == singly(dequantized, num_beams=3)
