"""Windows of token ids from text: tokenise, join, cut, draw.

A window is a 1-D int64 CPU tensor. It begins with the special tokens that the tokenizer puts before a text: a model
that was trained with BOS in front is far off without it.
"""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .sources import INSTEAD

_MAX_DRAWS = 1000  # per window: documents longer than 2k tokens are a few in a hundred of C4


@dataclass(frozen=True)
class Draw:
    """The windows to draw.

    Attributes:
        source: the name of the source in error messages.
        seq_len: tokens in a window, with the special tokens at its start.
    """

    source: str
    tokenizer: Any
    num_samples: int
    seq_len: int
    seed: int


def start_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text: BOS, CLS or none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def text_length(tokenizer: Any, seq_len: int, field: str = "seq_len") -> int:
    """Tokens of text in a window of `seq_len`.

    Raises:
        ValueError: naming `field`; the special tokens at the start leave no room.
    """
    room = seq_len - len(start_ids(tokenizer))
    if room < 1:
        raise ValueError(
            f"{field}={seq_len!r}: expected at least {seq_len - room + 1}, as windows begin with special tokens"
        )
    return room


def windows_of_texts(texts: Iterable[str | None], draw: Draw, limit: float = math.inf) -> list[torch.Tensor]:
    """Windows from the stream of all texts, each followed by EOS, or by a blank line if there is no EOS."""
    eos = draw.tokenizer.eos_token_id
    end = [eos] if eos is not None else draw.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return _cut(_stream(texts, end, draw, limit), draw)


def windows_of_chats(chats: Iterable[Any], draw: Draw, limit: float = math.inf) -> list[torch.Tensor]:
    """Windows from the stream of all chats, each as the tokenizer's template writes it."""
    tokenizer = draw.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{draw.source} holds chats: set tokenizer.chat_template, or pass a list of texts")
    texts = (tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    return _cut(_stream(texts, [], draw, limit), draw)


def windows_of_documents(documents: Sequence[str], draw: Draw) -> list[torch.Tensor]:
    """Random windows of random documents longer than a window, the way pruning papers use C4."""
    rng, size, windows = random.Random(draw.seed), text_length(draw.tokenizer, draw.seq_len), []
    start = start_ids(draw.tokenizer)
    for _ in range(_MAX_DRAWS * draw.num_samples):
        document = documents[rng.randrange(len(documents))]
        ids = draw.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > size:
            first = rng.randrange(len(ids) - size)
            windows.append(torch.tensor(start + ids[first : first + size]))
        if len(windows) == draw.num_samples:
            return windows
    found = f"{draw.source} gave {len(windows)} of {draw.num_samples} documents of over seq_len={draw.seq_len} tokens"
    raise ValueError(f'{found}: pass a smaller seq_len, or calibration="self", {INSTEAD}')


def _stream(texts: Iterable[str | None], end: list[int], draw: Draw, limit: float) -> torch.Tensor:
    """The tokens of all texts, each text followed by `end`; stops soon after `limit` tokens."""
    chunks, total = [], 0
    written = (text for text in texts if text is not None and text.strip())
    while total < limit and (batch := list(itertools.islice(written, 64))):
        encoded = draw.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        chunks.append(torch.tensor([token for ids in encoded for token in (*ids, *end)]))
        total += len(chunks[-1])
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64)


def _cut(stream: torch.Tensor, draw: Draw) -> list[torch.Tensor]:
    size, start = (
        text_length(draw.tokenizer, draw.seq_len),
        torch.tensor(start_ids(draw.tokenizer), dtype=torch.int64),
    )
    chunks = stream[: len(stream) // size * size].view(-1, size)
    if len(chunks) < draw.num_samples:
        needed = f"num_samples={draw.num_samples} of seq_len={draw.seq_len} need {draw.num_samples * size}"
        fits = f"num_samples={len(chunks)}" if len(chunks) else "a smaller seq_len"
        raise ValueError(f"{draw.source} has {len(stream)} tokens, {needed}: pass more text, or {fits}")
    order = random.Random(draw.seed).sample(range(len(chunks)), draw.num_samples)
    # A chat template can write BOS itself.
    return [chunk.clone() if _begins(chunk, start) else torch.cat([start, chunk]) for chunk in chunks[order]]


def _begins(chunk: torch.Tensor, start: torch.Tensor) -> bool:
    return torch.equal(chunk[: len(start)], start)
