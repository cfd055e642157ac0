"""Calibration text that a model writes itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..utils.modules import eval_mode
from .sources import INSTEAD

RUN = 4  # tokens
MOST_REPETITION = 0.4
ATTEMPTS = 3

logger = logging.getLogger("hf_sparselr")


def sample_from_model(
    model: Any,
    bos_id: int | None,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    batch_size: int = 8,
    prompts: torch.Tensor | None = None,
) -> list[torch.LongTensor]:
    """Token windows that the dense model itself writes.

    Samples the model's plain distribution. A window in which the model goes round in circles (`repetition`) is written
    again, up to twice; if there are still too few others, the least repetitive of such windows stay, with a warning.
    Random state, training flags and generation config are afterwards as before. The windows depend on `batch_size`.

    Args:
        bos_id: the first token of every window. None: the BOS of the model's generation config, or random ids if it
            has none.
        prompts: the first tokens (num_samples, fewer than seq_len) of the windows, in place of `bos_id`.

    Returns:
        `num_samples` int64 CPU tensors of shape (seq_len,).

    Raises:
        ValueError: the model cannot generate text on its own.
    """
    if not can_generate_text(model):
        name = type(model).__name__
        raise ValueError(f'calibration="self": {name} is no decoder that generates text: pass {INSTEAD}')
    good: list[torch.LongTensor] = []
    circles: list[torch.LongTensor] = []
    with _isolated(model, seed):
        starts = _start_ids(model, bos_id, num_samples, seed) if prompts is None else prompts
        for attempt in range(1, ATTEMPTS + 1):
            again = []
            for batch in starts.to(model.device).split(batch_size):
                for start, window in zip(batch, _continued(model, batch, seq_len), strict=True):
                    in_circles = repetition(window) > MOST_REPETITION
                    (circles if in_circles else good).append(window)
                    again += [start] if in_circles else []
            if not again:
                return good
            starts = _start_ids(model, bos_id, len(again), seed + attempt * 7919)
            starts = starts if prompts is None else torch.stack(again)
    missing = num_samples - len(good)
    logger.warning(
        "%s repeats itself in %d of %d windows that it writes, however often they are written again: such text is poor "
        "calibration data; pass texts of your own",
        type(model).__name__,
        missing,
        num_samples,
    )
    return good + sorted(circles, key=repetition)[:missing]


def repetition(window: torch.Tensor) -> float:
    """The share of the runs of four tokens in a window (length,) that stand in it before. Text by people has few."""
    runs = window.unfold(0, RUN, 1) if len(window) >= RUN else window[None]
    return 1 - len(torch.unique(runs, dim=0)) / len(runs)


def _continued(model: Any, starts: torch.Tensor, seq_len: int) -> tuple[torch.LongTensor, ...]:
    """Windows of `seq_len` tokens that begin with starts (rows, length), on the CPU."""
    from transformers import GenerationConfig

    own = model.generation_config
    length = seq_len - starts.shape[1]
    # Set on the model: generate() fills the open fields of a config that is an argument from the model's own. Nothing
    # is padded, because windows end together; without a pad id generate() warns.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=own.eos_token_id,
        bos_token_id=own.bos_token_id,
        pad_token_id=0,
        min_new_tokens=length,
        max_new_tokens=length,
    )
    return model.generate(input_ids=starts, attention_mask=torch.ones_like(starts)).cpu().unbind()


def can_generate_text(model: Any) -> bool:
    """Whether `sample_from_model` can sample from a model, which may be on the meta device."""
    return getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder


def _start_ids(model: Any, bos_id: int | None, num_samples: int, seed: int) -> torch.Tensor:
    bos = model.generation_config.bos_token_id if bos_id is None else bos_id
    if bos is not None:
        return torch.full((num_samples, 1), bos)
    vocab_size = model.get_input_embeddings().num_embeddings
    return torch.randint(vocab_size, (num_samples, 1), generator=torch.Generator().manual_seed(seed))


@contextmanager
def _isolated(model: Any, seed: int) -> Iterator[None]:
    """Eval mode and seeded random state inside; these and the generation config are restored after."""
    config = model.generation_config
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with eval_mode(model), torch.random.fork_rng(devices=gpus):
            # torch.manual_seed would also reseed GPUs that are not forked.
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(seed)
            yield
    finally:
        model.generation_config = config
