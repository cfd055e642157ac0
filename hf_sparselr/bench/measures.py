"""How near a compressed language model is to its dense self: on windows of tokens, and on hidden last words."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..data.windows import start_ids

BATCH = 8  # windows at a time
PASSAGES = 16  # at a time
SHORTEST, LONGEST = 40, 160  # words of a passage


@dataclass(frozen=True)
class Passage:
    """A passage of text whose last word is hidden.

    Attributes:
        context: token ids (length,) of the text before the word.
        word: token ids of the word, with the space before it.
    """

    context: torch.Tensor
    word: torch.Tensor


def token_windows(texts: Iterable[str], tokenizer: Any, length: int) -> torch.Tensor:
    """Texts, joined by blank lines, as windows (windows, length) of token ids. Each begins with the tokens that the
    tokenizer puts before a text; a last, shorter window is left out.

    Raises:
        ValueError: the texts do not fill a window.
    """
    start = torch.tensor(start_ids(tokenizer), dtype=torch.int64)
    ids = torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
    parts = ids[: len(ids) // (length - len(start)) * (length - len(start))].view(-1, length - len(start))
    if not len(parts):
        raise ValueError(f"an evaluation text has {len(ids)} tokens: expected at least one window of {length}")
    return torch.cat([start.expand(len(parts), -1), parts], 1)


@torch.no_grad()
def compare(model: nn.Module, dense: nn.Module, windows: torch.Tensor) -> dict[str, float]:
    """Predictions of two models on windows of token ids (windows, length); nothing predicts a window's first token.

    Returns:
        perplexity: of `model`.
        gap: its distance from the perplexity of `dense`.
        kl: mean KL(dense || model) of the predicted distributions, in nats.
        agreement: the share of predictions whose most probable token is the same.
    """
    device = next(dense.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for ids in windows.split(BATCH):
        ids = ids.to(device)
        own, other = (each(input_ids=ids, use_cache=False).logits for each in (model, dense))
        for mine, theirs, row in zip(own, other, ids, strict=True):  # FP32 copies of all logits could be large
            mine, theirs = (F.log_softmax(logits[:-1].float(), -1) for logits in (mine, theirs))
            losses = [F.nll_loss(each, row[1:], reduction="sum") for each in (mine, theirs)]
            divergence = F.kl_div(mine, theirs, log_target=True, reduction="sum")
            equal = (mine.argmax(-1) == theirs.argmax(-1)).sum()
            sums += torch.stack([*losses, divergence, equal.float()]).double()
    mine, theirs, divergence, equal = (sums / (windows.shape[0] * (windows.shape[1] - 1))).tolist()
    return {
        "perplexity": math.exp(mine),
        "gap": math.exp(mine) - math.exp(theirs),
        "kl": divergence,
        "agreement": equal,
    }


def passages(texts: Iterable[str], tokenizer: Any, count: int, longest: int) -> list[Passage]:
    """Paragraphs of texts with their last word hidden, evenly spread over the texts.

    Args:
        count: at most so many.
        longest: tokens that a model takes; longer passages are left out.
    """
    paragraphs = [part for text in texts for part in re.split(r"\n\s*\n", text)]
    found = []
    for paragraph in paragraphs:
        words = paragraph.split()
        last = re.fullmatch(r"\W*(\w+)\W*", words[-1]) if words else None
        if SHORTEST <= len(words) <= LONGEST and last:
            found.append((" ".join(words[:-1]), f" {last[1]}"))
    chosen = found[:: max(1, len(found) // count)][:count]
    result = []
    for context, word in chosen:
        start = _ids(tokenizer, context)
        whole = _ids(tokenizer, context + word)
        if torch.equal(whole[: len(start)], start) and len(start) < len(whole) <= longest:
            result.append(Passage(start, whole[len(start) :]))
    return result


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


@torch.no_grad()
def last_word_accuracy(model: nn.Module, hidden: list[Passage]) -> float:
    """The share of passages whose hidden word is the most probable continuation, token by token.

    Args:
        model: a causal language model: passages of a batch are padded at their ends, which it does not see before.
    """
    device = next(model.parameters()).device
    right = 0
    ordered = sorted(hidden, key=lambda passage: len(passage.context) + len(passage.word))
    for start in range(0, len(ordered), PASSAGES):
        batch = ordered[start : start + PASSAGES]
        ids = [torch.cat([passage.context, passage.word]) for passage in batch]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        found = model(input_ids=padded, use_cache=False).logits.argmax(-1).cpu()
        for passage, tokens in zip(batch, found, strict=True):
            first = len(passage.context) - 1
            right += torch.equal(tokens[first : first + len(passage.word)], passage.word)
    return right / len(hidden)


@torch.no_grad()
def round_to_8_bits(model: nn.Module, layers: Iterable[str]) -> int:
    """Rounds the weights of layers in place to 255 levels a row of outputs, and returns how many bytes that saves.

    The levels are those of symmetric rounding to the nearest: the user's alternative to a packed model.
    """
    saved = 0
    for name in layers:
        layer = model.get_submodule(name)
        weight = layer.weight
        outputs = 0 if isinstance(layer, nn.Linear) else -1  # transformers' Conv1D stores (in, out)
        across = [dim for dim in range(weight.ndim) if dim != outputs % weight.ndim]
        scale = weight.abs().amax(across, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        weight.copy_((weight / scale).round() * scale)
        stored = 2  # bytes of a weight in half precision, and of a row's scale
        saved += weight.numel() * (stored - 1) - scale.numel() * stored
    return saved
