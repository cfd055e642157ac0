"""Calibration samples: the arguments of a model's forward pass, as dicts of tensors.

A sample is {argument name: tensor}, with one row in the first dimension of every tensor, such as {"input_ids":
(1, length)} or what a processor returns for an image. Token windows are the special case with input_ids alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

Sample = dict[str, torch.Tensor]


def token_samples(windows: Iterable[torch.Tensor]) -> list[Sample]:
    """Token windows (length,) as samples."""
    return [{"input_ids": window[None]} for window in windows]


def is_model_inputs(item: Any) -> bool:
    """Whether an item is a mapping of model inputs that holds more than token ids and their mask."""
    return isinstance(item, Mapping) and bool(set(item) - {"input_ids", "attention_mask", "content", "role"})


def is_image(item: Any) -> bool:
    """Whether an item is a PIL image, or an array (height, width, channels)."""
    return type(item).__module__.startswith("PIL.") or getattr(item, "ndim", 0) == 3


def is_audio(item: Any) -> bool:
    """Whether an item is an array of samples (time,) of sound, in floating point."""
    return isinstance(item, np.ndarray) and item.ndim == 1 and item.dtype.kind == "f"


def is_illustrated(chat: Any) -> bool:
    """Whether a chat (a list of message dicts) has a part that is not text, such as an image or sound."""
    contents = [message.get("content") for message in chat if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") != "text" for part in parts)


def processed(items: Iterable[Any], kind: str, processor: Any) -> Iterator[Mapping[str, Any]]:
    """The model inputs that a processor makes of items, one at a time.

    Args:
        kind: "images"; "audio", with the sampling rate of the processor's feature extractor; "illustrated chats".
    """
    if kind == "illustrated chats":
        as_tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return (processor.apply_chat_template(item, **as_tensors) for item in items)
    if kind == "images":
        return (processor(images=item, return_tensors="pt") for item in items)
    extractor = getattr(processor, "feature_extractor", processor)
    return (extractor(item, sampling_rate=extractor.sampling_rate, return_tensors="pt") for item in items)


def samples_of(item: Mapping, where: str) -> list[Sample]:
    """The samples in a mapping of model inputs, on the CPU.

    Tensors with one row each, or with equal numbers of rows, become a sample a row. A mapping whose tensors have
    different numbers of rows is one sample: some models have several images a text.

    Raises:
        TypeError, ValueError: starting with `where`; a value is no tensor, or there is none.
    """
    tensors = {}
    for key, value in item.items():
        if value is None or isinstance(value, bool | str):
            continue
        try:
            tensors[key] = torch.as_tensor(value).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where}: {key} is a {type(value).__name__}, expected a tensor") from error
    if not tensors or any(tensor.ndim == 0 for tensor in tensors.values()):
        raise ValueError(f"{where} has keys {sorted(item)}: expected tensors with the samples in dimension 0")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {key} holds NaN or Inf")
    sizes = {len(tensor) for tensor in tensors.values()}
    if len(sizes) > 1 or sizes == {1}:
        return [tensors]
    return [{key: tensor[row : row + 1] for key, tensor in tensors.items()} for row in range(sizes.pop())]


def make_batches(samples: list[Sample], size: int) -> list[Sample]:
    """Joins up to `size` consecutive samples of equal names and shapes. Nothing is padded."""
    batches: list[list[Sample]] = []
    for sample in samples:
        if not batches or len(batches[-1]) == size or _kind(batches[-1][0]) != _kind(sample):
            batches.append([])
        batches[-1].append(sample)
    return [{key: torch.cat([sample[key] for sample in batch]) for key in batch[0]} for batch in batches]


def rows(batch: Sample) -> int:
    """How many samples a batch holds."""
    leading = batch.get("input_ids", next(iter(batch.values())))
    return len(leading)


def first_row(batch: Sample) -> Sample:
    """The first sample of a batch; the batch itself where its tensors cannot be cut row by row."""
    count = rows(batch)
    if any(len(tensor) != count for tensor in batch.values()):
        return batch
    return {key: tensor[:1] for key, tensor in batch.items()}


def _kind(sample: Sample) -> dict[str, tuple]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in sample.items()}
