"""Calibration text that a model writes itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..utils.modules import eval_mode
from .sources import INSTEAD


def sample_from_model(
    model: Any, bos_id: int | None, *, num_samples: int, seq_len: int, seed: int, batch_size: int = 8
) -> list[torch.LongTensor]:
    """Token windows that the dense model itself writes, for calibration="self".

    Samples the model's plain distribution. Random state, training flags and generation config are afterwards as
    before. The windows depend on `batch_size`.

    Args:
        bos_id: the first token of every window. None: the BOS of the model's generation config, or random ids if it
            has none.

    Returns:
        `num_samples` int64 CPU tensors of shape (seq_len,).

    Raises:
        ValueError: the model cannot generate text on its own.
    """
    from transformers import GenerationConfig

    if not can_generate_text(model):
        name = type(model).__name__
        raise ValueError(f'calibration="self": {name} is no decoder that generates text: pass {INSTEAD}')
    starts = _start_ids(model, bos_id, num_samples, seed).to(model.device)
    length = {"min_new_tokens": seq_len - 1, "max_new_tokens": seq_len - 1}
    eos = model.generation_config.eos_token_id
    windows: list[torch.LongTensor] = []
    with _isolated(model, seed):
        # Set on the model: generate() fills the open fields of a config that is an argument from the model's own.
        # Nothing is padded, because windows end together; without a pad id generate() warns.
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=0, **length
        )
        for batch in starts.split(batch_size):
            windows += model.generate(input_ids=batch, attention_mask=torch.ones_like(batch)).cpu().unbind()
    return windows


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
