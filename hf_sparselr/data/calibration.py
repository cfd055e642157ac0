"""Calibration data: from a source that a user names or passes to a list of samples.

A sample is a dict of model inputs (see `model_inputs`); from text and token ids, a window of token ids. Windows are
never padded: a Gram matrix would count the padding as input.
"""

import itertools
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .model_inputs import (
    Sample,
    is_audio,
    is_illustrated,
    is_image,
    is_model_inputs,
    processed,
    samples_of,
    token_samples,
)
from .sources import C4, COLUMNS, FILES, INSTEAD, column_of, is_dataset, load_split, read_files
from .windows import Draw, windows_of_chats, windows_of_documents, windows_of_texts

CUSTOM = "custom"  # config.json's name for files and for data in memory

# Kinds of items that a processor turns into model inputs.
PROCESSED = ("images", "audio", "illustrated chats")

_C4_SHARD = "en/c4-train.00000-of-01024.json.gz"
_POOL = 16  # windows tokenised per window drawn from a data set, which can be too large to tokenise whole
_STRING = re.compile(r"self|file:.*\S.*|\w[\w.-]*(/\w[\w.-]*)?(:[^\s:]+)?")
_INT_DTYPES = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_ALLOWED = (
    'pass "self", "file:GLOB", a Hub data set "id" or "id:config", a list of texts, a list of chats (each a '
    "list of message dicts, images in them allowed), a datasets.Dataset, integer token tensors ((samples, tokens) or "
    "an iterable), dicts of model inputs as a processor returns them, or a list of images or of audio arrays"
)


def check_source(calibration: Any) -> None:
    """Check a source's type and shape without reading, consuming or copying its data.

    Raises:
        TypeError: not a kind of source, or a list of mixed or unsupported items.
        ValueError: an empty source, a malformed string, a missing column, tensors of wrong dtype or shape.
    """
    source = _show(calibration)
    if isinstance(calibration, torch.Tensor):
        return _check_ids(calibration, source, ndims=(2,))
    if isinstance(calibration, list | tuple):
        return _check_list(calibration, source)
    if isinstance(calibration, str):
        if not _STRING.fullmatch(calibration):
            raise ValueError(f"{source} names no source: {_ALLOWED}")
    elif is_dataset(calibration):
        column_of(calibration.column_names or COLUMNS, source)
        if getattr(calibration, "num_rows", 1) == 0:
            raise ValueError(f"{source} has no rows: {_ALLOWED}")
    elif isinstance(calibration, Mapping | bytes | bytearray) or not isinstance(calibration, Iterable):
        raise TypeError(f"{source} is not calibration data: {_ALLOWED}")


def reader_of(calibration: Any) -> str | None:
    """The reader that a source needs (not "self"): the model's "tokenizer", its "processor", or None."""
    if is_dataset(calibration):
        columns: Iterable[str] = calibration.column_names or next(iter(calibration), {})
        return None if column_of(columns, _show(calibration)) == "input_ids" else "tokenizer"
    if isinstance(calibration, str):
        return "tokenizer"
    kind = _kind(calibration[0]) if isinstance(calibration, list | tuple) else None
    if kind in PROCESSED:
        return "processor"
    return "tokenizer" if kind in ("texts", "chats") else None


def load_samples(
    calibration: Any, reader: Any, *, num_samples: int, seq_len: int, seed: int, vocab_size: int | None
) -> list[Sample]:
    """Calibration samples from any source except "self".

    Dicts of model inputs are taken in order, the first `num_samples`, as they are (see `model_inputs.samples_of`); so
    are the outputs of the processor for images and audio. All other sources give token windows, see `load_windows`.

    Args:
        reader: the model's tokenizer or processor, see `reader_of`; else None.
        vocab_size: of the model; None if it has no vocabulary.

    Raises:
        TypeError, ValueError, OSError: as `load_windows`; too few dicts, or values that are no finite tensors.
    """
    check_source(calibration)
    kind, calibration = _peek(calibration)
    if kind in PROCESSED:
        if reader is None:
            raise ValueError(f"{_show(calibration)} holds {kind}, and tokenizer=None: pass the model's processor")
        calibration, kind = processed(calibration, kind, reader), "model inputs"
    if kind == "model inputs":
        return _load_model_inputs(calibration, num_samples, vocab_size)
    size = {"num_samples": num_samples, "seq_len": seq_len, "seed": seed}
    return token_samples(load_windows(calibration, reader, **size, vocab_size=vocab_size))


def _peek(source: Any) -> tuple[str | None, Any]:
    """The kind of the items of a source, None where the source itself is a kind; and the source, still whole."""
    if isinstance(source, str | torch.Tensor) or is_dataset(source):
        return None, source
    if isinstance(source, list | tuple):
        return _kind(source[0]), source
    items = iter(source)
    first = list(itertools.islice(items, 1))
    return (_kind(first[0]) if first else None), itertools.chain(first, items)


def _load_model_inputs(items: Iterable[Any], num_samples: int, vocab_size: int | None) -> list[Sample]:
    source = "calibration=<dicts of model inputs>"
    samples: list[Sample] = []
    for index, item in enumerate(items):
        where = f"{source} item {index}"
        if not isinstance(item, Mapping):
            raise TypeError(f"{where} is {reprlib.repr(item)}, expected a dict as the ones before it")
        samples += samples_of(item, where)
        if len(samples) >= num_samples:
            break
    if len(samples) < num_samples:
        raise ValueError(
            f"{source} has {len(samples)} samples, num_samples={num_samples} are needed: pass more, or "
            f"num_samples={len(samples)}"
        )
    samples = samples[:num_samples]
    for name in ("input_ids", "decoder_input_ids"):
        _check_vocabulary([sample[name] for sample in samples if name in sample], source, vocab_size)
    return samples


def load_windows(
    calibration: Any, tokenizer: Any, *, num_samples: int, seq_len: int, seed: int, vocab_size: int | None
) -> list[torch.Tensor]:
    """Token windows from any source except "self".

    Texts, files and chats form one stream, cut into windows of `seq_len`, of which `num_samples` are drawn without
    replacement. A text ends with the tokenizer's EOS (a blank line if it has none), a chat as its template says. A
    window begins with the special tokens that the tokenizer puts before a text, such as BOS. A data set's rows are read
    in an order drawn from `seed` (a streamed one's as they come), and only until there are 16 windows per sample. Token
    ids are taken in order, the first `num_samples`, cut to `seq_len`; positions whose attention_mask is 0 are dropped.

    Args:
        tokenizer: a transformers tokenizer; may be None for token ids.

    Returns:
        `num_samples` int64 CPU tensors of shape (seq_len,), or (2 to seq_len,) from token ids.

    Raises:
        TypeError: as `check_source`, or an iterable that yields something else than token ids.
        ValueError: too little or empty data, no tokenizer or chat template, a missing column, bad ids.
        OSError: the Hub data set cannot be loaded.
    """
    check_source(calibration)
    source = _show(calibration)
    if isinstance(calibration, str) and calibration == "self":
        raise ValueError(f"{source} holds no data: call sample_from_model with the dense model")
    windows = _load(calibration, Draw(source, tokenizer, num_samples, seq_len, seed))
    _check_vocabulary(windows, source, vocab_size)
    return windows


def _check_vocabulary(windows: list[torch.Tensor], source: str, vocab_size: int | None) -> None:
    """Raises ValueError at an id that the model has no embedding for. A model without a vocabulary has no limit."""
    if not vocab_size:
        return
    for index, window in enumerate(windows):
        bad = window[(window < 0) | (window >= vocab_size)].tolist()
        if bad:
            where = f"{source} has id {bad[0]} in sample {index}, outside [0, vocab_size={vocab_size})"
            raise ValueError(f"{where}: pass ids, or a tokenizer, that belong to the model")


def _show(calibration: Any) -> str:
    if isinstance(calibration, str):
        return f"calibration={calibration[:80]!r}"
    size = f" of shape {tuple(calibration.shape)}" if hasattr(calibration, "shape") else ""
    return f"calibration=<{type(calibration).__name__}{size}>"


def _check_ids(ids: torch.Tensor, where: str, ndims: tuple[int, ...] = (1, 2)) -> None:
    if ids.dtype not in _INT_DTYPES:
        raise ValueError(f"{where} holds {ids.dtype}, not integer token ids: pass an int64 tensor")
    if ids.ndim not in ndims or ids.numel() == 0 or ids.shape[-1] < 2:
        raise ValueError(f"{where} has shape {tuple(ids.shape)}: pass (samples, tokens), at least 2 tokens")


def _check_list(items: Sequence[Any], source: str) -> None:
    if not items:
        raise ValueError(f"{source} is empty: {_ALLOWED}")
    for index, item in enumerate(items):
        if _kind(item) is None or _kind(item) != _kind(items[0]):
            where = f"{source} has {reprlib.repr(item)} at index {index}, and a list holds one kind of item"
            raise TypeError(f"{where}: {_ALLOWED}")
        if isinstance(item, torch.Tensor):
            _check_ids(item, f"{source} item {index}")


def _kind(item: Any) -> str | None:
    if isinstance(item, str):
        return "texts"
    if is_model_inputs(item):
        return "model inputs"
    if is_image(item) and not isinstance(item, torch.Tensor):
        return "images"
    if is_audio(item):
        return "audio"
    if hasattr(item, "__array__") or (isinstance(item, Mapping) and "input_ids" in item):
        return "token ids"
    if not isinstance(item, list | tuple) or not item:
        return None
    if all(isinstance(message, Mapping) for message in item):
        return "illustrated chats" if is_illustrated(item) else "chats"
    return "token ids" if isinstance(item[0], int) else None


def _load(data: Any, draw: Draw) -> list[torch.Tensor]:
    if isinstance(data, str) and data.startswith(FILES):
        return _from_text("texts", read_files(data, draw.source), draw)
    if isinstance(data, str):
        _need_tokenizer(draw)  # before a download that may take long
        if data == C4:
            return windows_of_documents(_load_hub(data, data_files={"train": _C4_SHARD})["text"], draw)
        data = _load_hub(data)
    if is_dataset(data):
        return _from_dataset(data, draw)
    kind = _kind(data[0]) if isinstance(data, list | tuple) else "token ids"
    return _from_ids(data, draw) if kind == "token ids" else _from_text(kind, data, draw)


def _load_hub(calibration: str, **options: Any) -> Any:
    return load_split(calibration, "train", _show(calibration), f'calibration="self", {INSTEAD}', **options)


def _from_dataset(dataset: Any, draw: Draw) -> list[torch.Tensor]:
    # A stream may know its columns only from a row.
    column = column_of(dataset.column_names or next(iter(dataset), {}), draw.source)
    rows = dataset.select_columns(column)
    if column == "input_ids":
        return _from_ids((row[column] for row in rows), draw)
    if hasattr(dataset, "num_rows"):
        rows = rows.shuffle(seed=draw.seed, keep_in_memory=True)
    limit = _POOL * draw.num_samples * draw.seq_len
    return _from_text(COLUMNS[column], (row[column] for row in rows), draw, limit)


def _need_tokenizer(draw: Draw) -> None:
    if draw.tokenizer is None:
        raise ValueError(f"{draw.source} is text, and tokenizer=None: pass the model's, or token ids")


def _from_text(kind: str | None, items: Iterable[Any], draw: Draw, limit: float = math.inf) -> list[torch.Tensor]:
    _need_tokenizer(draw)
    return windows_of_texts(items, draw, limit) if kind == "texts" else windows_of_chats(items, draw, limit)


def _from_ids(items: Iterable[Any], draw: Draw) -> list[torch.Tensor]:
    rows = (row for i, item in enumerate(items) for row in token_rows(item, f"{draw.source} item {i}"))
    windows = [row[: draw.seq_len].long() for row in itertools.islice(rows, draw.num_samples)]
    if len(windows) < draw.num_samples:
        has = f"{draw.source} has {len(windows)} samples, {sum(map(len, windows))} tokens"
        needed = f"num_samples={draw.num_samples} of up to seq_len={draw.seq_len} are needed"
        raise ValueError(f"{has}; {needed}: pass more, or num_samples={len(windows)}")
    return windows


def token_rows(item: Any, where: str) -> Iterator[torch.Tensor]:
    """The unpadded rows of a tensor, array or list of ids, or of a mapping's input_ids.

    Yields:
        1-D integer CPU tensors of at least 2 ids.

    Raises:
        TypeError, ValueError: starting with `where`; no ids, no integers, or fewer than 2 ids in a row.
    """
    batch = item if isinstance(item, Mapping) else {"input_ids": item}
    try:
        ids = torch.atleast_2d(torch.as_tensor(batch.get("input_ids")).cpu())
        mask = torch.as_tensor(batch.get("attention_mask", True)).cpu().bool().expand(ids.shape)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{where} is {reprlib.repr(item)}, not a tensor of token ids"
        raise TypeError(f"{what}: pass integers of shape (tokens,) or (rows, tokens)") from error
    _check_ids(ids, where, ndims=(2,))
    for row, kept in zip(ids, mask, strict=True):
        _check_ids(row[kept], where)
        yield row[kept]
