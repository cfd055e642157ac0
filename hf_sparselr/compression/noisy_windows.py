"""Calibration windows with random tokens in them, beside the windows as they are.

Text of one kind leaves open what a layer does with other inputs, and the solves and matching fit what it leaves open to
noise. The dense model says what random tokens should give as well as it does for text, so windows of both bind more.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.model_inputs import Sample
from .model_structure import input_embeddings

REPLACED = 0.3  # of the tokens of a noisy window


def with_noisy_windows(samples: list[Sample], share: float, model: PreTrainedModel, seed: int) -> list[Sample]:
    """Samples, and after some of them, evenly spread, the same with 30% of their tokens replaced by random ones.

    Tokens with a role that the model's config names, such as the first one or an image's place, are neither replaced
    nor drawn. Samples with other inputs than tokens and their mask get no such copy, nor do those of models without
    embeddings of tokens.

    Args:
        share: so many noisy windows for each sample, in [0, 1].
    """
    rows = getattr(input_embeddings(model), "num_embeddings", None)
    size = getattr(model.config.get_text_config(), "vocab_size", rows)
    if not isinstance(rows, int) or not isinstance(size, int):
        return samples
    size = min(size, rows)
    roles = torch.tensor(sorted(_roles(model.config)), dtype=torch.int64)
    if size <= len(roles):
        return samples
    drawn = torch.ones(size, dtype=torch.bool)
    drawn[roles[roles < size]] = False
    vocabulary, generator = drawn.nonzero().flatten(), torch.Generator().manual_seed(seed)
    result = []
    for index, sample in enumerate(samples):
        result.append(sample)
        if int((index + 1) * share) > int(index * share) and set(sample) <= {"input_ids", "attention_mask"}:
            result.append(_noisy(sample, vocabulary, roles, generator))
    return result


def _noisy(sample: Sample, vocabulary: torch.Tensor, roles: torch.Tensor, generator: torch.Generator) -> Sample:
    tokens = sample["input_ids"]
    replaced = torch.rand(tokens.shape, generator=generator) < REPLACED
    replaced &= ~torch.isin(tokens, roles)
    random = vocabulary[torch.randint(len(vocabulary), tokens.shape, generator=generator)]
    return {**sample, "input_ids": torch.where(replaced, random.to(tokens.dtype), tokens)}


def _roles(config: PreTrainedConfig) -> set[int]:
    """The tokens that a config, or one inside it, names: values of fields such as eos_token_id, image_token_index."""
    return {token for token in _named_tokens(config.to_dict()) if token >= 0}


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _named_tokens(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in values if isinstance(each, int))
