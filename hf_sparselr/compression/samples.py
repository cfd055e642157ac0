"""The calibration samples of one run: loaded before the weights, or written by the dense model."""

import logging
import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..config.sparselr_config import SparseLRConfig
from ..data.calibration import CUSTOM, load_samples, reader_of
from ..data.model_inputs import Sample, token_samples
from ..data.origin import Origin
from ..data.self_generation import repetition, sample_from_model
from .capture import check_arguments
from .model_structure import context_length

logger = logging.getLogger("hf_sparselr")

PROMPT = 16  # tokens of a calibration sample that a prompted window begins with
PROMPTED = 0.5  # of the windows, where those that begin with nothing differ from each other
COMPARED = 64  # windows of each kind
MORE_ALIKE = 0.1  # by which the repetition in windows that begin with nothing may be above that in prompted ones
MOST_AT_A_TIME = 2048  # windows that the dense model writes at a time for distillation
WIDTH_TIMES_WINDOWS = 2**20  # bounds the memory of keys and values, which grows with the model's width
OVER = 1.25  # times these two, where that saves a part


@dataclass(frozen=True)
class Samples:
    """Calibration samples, made when they can be made.

    Attributes:
        origin: of the dense model; its tokenizer is loaded from there.
        loaded: None for "self", whose samples need the weights.
    """

    config: SparseLRConfig
    origin: Origin
    loaded: list[Sample] | None

    @classmethod
    def load(cls, model: PreTrainedModel, config: SparseLRConfig, origin: Origin) -> "Samples":
        """Reads the data that the config names; the model may be on the meta device.

        Raises:
            TypeError, ValueError, OSError: see `data.calibration.load_samples`; no tokenizer for text, no processor
                for images or audio.
        """
        source = config.calibration
        if isinstance(source, str) and source == CUSTOM:
            raise ValueError(
                f"calibration={CUSTOM!r} stands for data that were not stored with the config: pass the data again"
            )
        if isinstance(source, str) and source == "self":
            return cls(config, origin, None)
        needed = reader_of(source)
        reader = config.tokenizer if needed else None
        if needed and reader is None:
            reader = origin.tokenizer() if needed == "tokenizer" else origin.processor()
        if needed == "tokenizer":
            reader = getattr(reader, "tokenizer", reader)  # of a processor
        samples = load_samples(
            source,
            reader,
            num_samples=config.num_samples,
            seq_len=_bounded(config.seq_len, model),
            seed=config.seed,
            vocab_size=getattr(model.config.get_text_config(), "vocab_size", None),
        )
        check_arguments(model, samples)
        return cls(config, origin, samples)

    def calibration(self, model: PreTrainedModel) -> list[Sample]:
        """The calibration samples; those of "self" are written by `model`, which is dense."""
        if self.loaded is not None:
            return self.loaded
        config = self.config
        windows = sample_from_model(
            model,
            self._bos_id(),
            num_samples=config.num_samples,
            seq_len=_bounded(config.seq_len, model),
            seed=config.seed,
        )
        return token_samples(windows)

    def for_distillation(self, model: PreTrainedModel, calibration: list[Sample]) -> tuple[list[Sample], dict]:
        """The samples that `distill.self_samples` asks the dense model to write beside the calibration samples.

        Returns:
            The samples, and how they begin: {"prompted": the share of them that continue a calibration sample,
            "alike": {"prompted": ..., "plain": the share of runs of four tokens that stand in the text before}}, the
            latter where it chose the share.
        """
        options = self.config.distill
        share = PROMPTED if options.prompted is None else options.prompted
        count = round(options.self_samples * share) if self.loaded is not None else 0
        prompted = self._continued(model, calibration, count, self.config.seed + 1)
        plain = self._written(model, options.self_samples - len(prompted), None, self.config.seed + 1)
        found: dict = {}
        if options.prompted is None and prompted and plain:
            few = min(len(prompted), len(plain), COMPARED)
            found = {"prompted": repetition(torch.cat(prompted[:few])), "plain": repetition(torch.cat(plain[:few]))}
            if found["plain"] > found["prompted"] + MORE_ALIKE:
                plain = self._continued(model, calibration, len(plain), self.config.seed + 2)
                prompted, plain = prompted + plain, []
        share = len(prompted) / max(1, options.self_samples)
        return token_samples(prompted + plain), {"prompted": share, "alike": found}

    def _continued(
        self, model: PreTrainedModel, calibration: list[Sample], count: int, seed: int
    ) -> list[torch.Tensor]:
        """Windows that begin like places in the calibration samples; none where those are too short."""
        length = _bounded(self.config.distill.self_len, model)
        prompts = _prompts(calibration, count, min(PROMPT, length // 2), self._bos_id(), seed)
        return self._written(model, len(prompts), prompts, seed)

    def _written(
        self, model: PreTrainedModel, count: int, prompts: torch.Tensor | None, seed: int
    ) -> list[torch.Tensor]:
        if not count:
            return []
        return sample_from_model(
            model,
            self._bos_id(),
            num_samples=count,
            seq_len=_bounded(self.config.distill.self_len, model),
            seed=seed,
            batch_size=_at_a_time(model, count),
            prompts=prompts,
        )

    def _bos_id(self) -> int | None:
        """The tokenizer's BOS; None leaves it to the model's own."""
        try:
            tokenizer = self.config.tokenizer or self.origin.tokenizer()
        except OSError as error:
            logger.debug("%s", error)
            return None
        return getattr(getattr(tokenizer, "tokenizer", tokenizer), "bos_token_id", None)


def _prompts(samples: list[Sample], count: int, length: int, bos_id: int | None, seed: int) -> torch.Tensor:
    """(count, length) tokens from random places of token samples, each after a BOS where its sample begins with one.

    Empty where samples have no, or too few, tokens.
    """
    texts = [_real_tokens(sample) for sample in samples if "input_ids" in sample]
    texts = [text for text in texts if len(text) >= length]
    if not (texts and length and count):
        return torch.zeros(0, length, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for index in range(count):
        text = texts[index % len(texts)]
        place = int(torch.randint(len(text) - length + 1, (1,), generator=generator))
        prompt = text[place : place + length].clone()
        if int(text[0]) == bos_id:
            prompt[0] = bos_id
        prompts.append(prompt)
    return torch.stack(prompts)


def _real_tokens(sample: Sample) -> torch.Tensor:
    """The token ids (length,) of a sample without padding."""
    ids, mask = sample["input_ids"][0], sample.get("attention_mask")
    return ids if mask is None else ids[mask[0].bool()]


def _at_a_time(model: PreTrainedModel, count: int) -> int:
    """Windows in each of few equal parts of `count`: a small model takes as long for a few windows as for many."""
    width = model.get_input_embeddings().weight.shape[1]
    most = max(64, min(MOST_AT_A_TIME, WIDTH_TIMES_WINDOWS // width))
    return math.ceil(count / math.ceil(count / (most * OVER)))


def warn_of_few_tokens(samples: list[Sample], widths: dict[str, int]) -> None:
    """Warns if a layer has more inputs than there are calibration tokens.

    Nothing is said of samples other than tokens: how many positions a model makes of an image, only the model knows.

    Args:
        widths: the number of inputs of every planned layer.
    """
    if not all("input_ids" in sample for sample in samples):
        return
    tokens = sum(sample["input_ids"].numel() for sample in samples)
    widest = max(widths, key=widths.__getitem__)
    if tokens < widths[widest]:
        logger.warning(
            "%d calibration tokens are fewer than the %d inputs of %s: the layer can fit them exactly, and a small "
            "error then says nothing about other text; raise num_samples or seq_len",
            tokens,
            widths[widest],
            widest,
        )


def _bounded(length: int, model: PreTrainedModel) -> int:
    """A window's length, bounded by the model's context."""
    limit = context_length(model)
    return min(length, limit) if limit else length
