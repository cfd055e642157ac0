"""Perplexity of a causal language model on text or token ids."""

import re
import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from ..data import calibration as sources
from ..data.model_inputs import make_batches, token_samples
from ..data.windows import start_ids, text_length
from ..utils.modules import eval_mode
from ..utils.validation import check_integer

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^\s:]+)?")  # a text has white space
_INSTEAD = '"file:GLOB", a text, a list of texts, or token ids'
_ALLOWED = (
    'pass a text, a list of texts, "file:GLOB", a Hub data set "id" or "id:config", a datasets.Dataset with a '
    "text column, or token ids: an integer tensor (windows, tokens) or a list of integer tensors"
)


def perplexity(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    *,
    seq_len: int = 2048,
    stride: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
) -> float:
    """exp of the mean negative log-likelihood of the next token.

    Texts are joined by blank lines, tokenised once and cut into windows; a last, shorter window counts too. A window
    begins with the special tokens that the tokenizer puts before a text, such as BOS; these are not scored. With
    `stride` < `seq_len` windows overlap, and each scores only the tokens that the one before it did not reach.
    Logits are taken to float32, sums to float64. The model's training flags are afterwards as before.

    Args:
        model: a causal language model, packed or dense, with or without adapters, on any device or device map.
        data: a text, a list of texts, "file:GLOB" of UTF-8 text files, a Hub data set ("id" or "id:config", a
            string without white space; its test split), a `datasets.Dataset` with a text column, or token ids: an
            integer tensor (windows, tokens) or a list of integer tensors (tokens,). Each row of token ids is a
            window, scored on all but its first token.
        tokenizer: for text; may be None for token ids.
        seq_len: tokens a window of text, bounded by the model's context.
        stride: tokens from one window of text to the next, 1 to `seq_len`; None: `seq_len`, without overlap.
        batch_size: windows at a time.
        max_windows: score only the first ones; None: all.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
        OSError: the Hub data set cannot be loaded.
    """
    check_integer("seq_len", seq_len, 2)
    check_integer("batch_size", batch_size, 1)
    if max_windows is not None:
        check_integer("max_windows", max_windows, 1)
    _check_model(model)
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if _is_ids(data):
        windows, scored = _windows_of_ids(data, stride, context)
    else:
        if tokenizer is None:
            raise ValueError("tokenizer=None: data are text; pass the model's tokenizer, or token ids as data")
        length = text_length(tokenizer, min(seq_len, context or seq_len))
        stride = _check_stride(stride, length)
        windows, scored = _windows_of_text(_text(data), tokenizer, length, stride)
    windows, scored = windows[:max_windows], scored[:max_windows]
    _check_vocabulary(windows, config.vocab_size)
    with eval_mode(model), torch.no_grad():
        losses = [_losses(model, batch, scored) for batch, scored in _batches(windows, scored, batch_size)]
    return float((torch.stack(losses).sum() / sum(scored)).exp())


def _check_model(model: Any) -> None:
    if getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder:
        return
    raise TypeError(f"model=<{type(model).__name__}>: expected a causal language model with a language head")


def _check_stride(stride: int | None, length: int) -> int:
    if stride is None:
        return length
    check_integer("stride", stride, 1)
    if stride > length:
        raise ValueError(f"stride={stride!r}: expected an integer in 1..{length}, the tokens of text in a window")
    return stride


def _check_vocabulary(windows: list[torch.Tensor], vocab_size: int) -> None:
    for index, window in enumerate(windows):
        bad = window[(window < 0) | (window >= vocab_size)]
        if len(bad):
            raise ValueError(
                f"data has id {int(bad[0])} in window {index}, outside [0, vocab_size={vocab_size}): pass ids, or a "
                "tokenizer, that belong to the model"
            )


def _is_ids(data: Any) -> bool:
    if isinstance(data, list | tuple):
        return bool(data) and isinstance(data[0], torch.Tensor)
    return isinstance(data, torch.Tensor)


def _windows_of_ids(data: Any, stride: int | None, context: int | None) -> tuple[list[torch.Tensor], list[int]]:
    """The rows, and how many tokens of each are scored."""
    if stride is not None:
        raise ValueError(f"stride={stride!r}: data are token ids, whose rows are the windows; expected None")
    items = [data] if isinstance(data, torch.Tensor) else data
    windows = [row.long() for i, item in enumerate(items) for row in sources.token_rows(item, f"data item {i}")]
    longest = max(map(len, windows))
    if context and longest > context:
        raise ValueError(f"data has a window of {longest} tokens: expected at most the model's {context}")
    return windows, [len(window) - 1 for window in windows]


def _text(data: Any) -> str:
    """All texts, joined by blank lines."""
    where = f"data={reprlib.repr(data)}"
    if isinstance(data, str):
        if data.startswith(sources.FILES):
            data = sources.read_files(data, where)
        elif _HUB_ID.fullmatch(data):
            data = sources.load_split(data, "test", where, _INSTEAD)
        else:
            data = [data]
    if sources.is_dataset(data):
        data = _text_column(data, where)
    if not isinstance(data, list | tuple) or not all(isinstance(text, str) for text in data):
        raise TypeError(f"{where}: {_ALLOWED}")
    text = "\n\n".join(data)
    if not text.strip():
        raise ValueError(f"{where} holds no text: {_ALLOWED}")
    return text


def _text_column(dataset: Any, where: str) -> list[str]:
    # A stream may know its columns only from a row.
    columns = list(dataset.column_names or next(iter(dataset), {}))
    if "text" not in columns:
        raise ValueError(f"{where} has columns {columns}: rename one to text")
    return [row["text"] for row in dataset.select_columns("text") if row["text"] is not None]


def _windows_of_text(text: str, tokenizer: Any, length: int, stride: int) -> tuple[list[torch.Tensor], list[int]]:
    """Windows of up to `length` tokens of text, `stride` apart, and how many tokens at the end of each are scored."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    start_tokens = torch.tensor(start_ids(tokenizer), dtype=torch.int64)
    if len(start_tokens) + len(ids) < 2:
        raise ValueError(f"data={reprlib.repr(text)} has {len(ids)} tokens: expected at least 2")
    windows, scored, reached = [], [], 0
    for start in range(0, len(ids), stride):
        part = ids[start : start + length]
        window = torch.cat([start_tokens, part])
        new = min(start + len(part) - reached, len(window) - 1)  # nothing predicts a window's first token
        if new > 0:
            windows.append(window)
            scored.append(new)
        reached = start + len(part)
        if reached == len(ids):
            break
    return windows, scored


def _batches(windows: list[torch.Tensor], scored: list[int], size: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Windows of equal length together, with their parts of `scored`."""
    start = 0
    for batch in (sample["input_ids"] for sample in make_batches(token_samples(windows), size)):
        yield batch, scored[start : start + len(batch)]
        start += len(batch)


def _losses(model: Any, batch: torch.Tensor, scored: list[int]) -> torch.Tensor:
    """The summed loss of the last `scored` tokens of each window: float64, on the CPU."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    logits = model(input_ids=batch.to(device), use_cache=False).logits
    total = torch.zeros((), dtype=torch.float64)
    # A row at a time: in float32 the logits of a whole batch can be larger than the model.
    for row, ids, count in zip(logits, batch.to(logits.device), scored, strict=True):
        losses = F.cross_entropy(row[-count - 1 : -1].float(), ids[-count:], reduction="none")
        total += losses.cpu().double().sum()
    return total
