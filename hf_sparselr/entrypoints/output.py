"""The folder that a verb writes: checked before the work, filled after it."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..compression.experts import compressible_layers
from ..compression.linear_layers import weight_shape
from ..compression.plan import Layer
from ..data.origin import Origin

logger = logging.get_logger("hf_sparselr")


def check_folder(output_dir: str | os.PathLike) -> None:
    """Checks that files can be written there; creates nothing.

    Raises:
        TypeError, ValueError: it is no path.
        OSError: it is a file, lies below one, or nothing can be written there.
    """
    field = f"output_dir={str(output_dir)!r}"
    if not isinstance(output_dir, str | os.PathLike):
        raise TypeError(f"{field}: expected a str or os.PathLike, not {type(output_dir).__name__}")
    if not os.fspath(output_dir):  # else the files would land in the working directory
        raise ValueError(f"{field}: expected a folder")
    existing = _existing(output_dir)
    _check_names(field, Path(output_dir).absolute(), existing)
    if not existing.is_dir():
        raise NotADirectoryError(f"{field}: expected a folder, but {str(existing)!r} is a file")
    try:
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError("permission denied")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise PermissionError(
            f"{field}: expected a folder that can be written, but {str(existing)!r} cannot ({error})"
        ) from error


def _check_names(field: str, path: Path, existing: Path) -> None:
    """Checks that the file system takes the names of the folders that are to be made."""
    for name in path.relative_to(existing).parts:
        try:
            os.lstat(existing / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # too long, or with a null byte
            raise ValueError(f"{field}: expected a path that can be made ({_line(error)})") from error


def check_output(
    output_dir: str | os.PathLike,
    model: PreTrainedModel,
    plan: Mapping[str, Layer],
    origin: Origin,
    tokenizer: Any,
) -> list[Any]:
    """Checks that everything that will be written can be.

    Args:
        model: dense, or its skeleton, in the dtype in which it will be loaded.
        tokenizer: the one that the config was given.

    Returns:
        The processors to save beside the model.

    Raises:
        OSError: too little space.
        ValueError: a config or generation config that transformers refuses to save.
    """
    _check_space(output_dir, stored_bytes(model, plan))
    _check_config(model.config, f"config of {_model_name(model, origin)!r}", "Change model.config")
    _check_generation_config(model, origin)
    return _processors(origin, tokenizer)


def _check_space(output_dir: str | os.PathLike, needed: int) -> None:
    free = shutil.disk_usage(_existing(output_dir)).free
    if free < needed:
        raise OSError(
            f"output_dir={os.fspath(output_dir)!r}: expected {needed:,} bytes free for the checkpoint, found {free:,}"
        )


def stored_bytes(model: PreTrainedModel, plan: Mapping[str, Layer]) -> int:
    """Bytes of the packed checkpoint of a dense model, or of its skeleton, without the files' headers."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # tied ones once
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    layers = compressible_layers(model)
    for name, layer in plan.items():
        weight = layers[name].weight
        shape = rows, columns = weight_shape(layers[name])
        values = layer.pattern.kept(shape) + layer.low_rank_values(shape)
        total += rows * -(-columns // 8) + (values - weight.numel()) * weight.element_size()
    return total


def _check_generation_config(model: PreTrainedModel, origin: Origin) -> None:
    config = getattr(model, "generation_config", None)
    if model.device.type == "meta":  # a skeleton's is not the one beside the weights
        with suppress(OSError):
            config = GenerationConfig.from_pretrained(origin.name, **origin.arguments)
    if config is None:
        return
    advice = "Set model.generation_config on a loaded model, and compress that"
    _check_config(config, f"generation_config of {_model_name(model, origin)!r}", advice)


def _check_config(config: PreTrainedConfig | GenerationConfig, field: str, advice: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except Exception as error:  # transformers' own checks fail in many ways
            raise ValueError(f"{field} cannot be saved: {_line(error)} {advice}") from error


def _model_name(model: PreTrainedModel, origin: Origin) -> str:
    return origin.name or type(model).__name__


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _processors(origin: Origin, tokenizer: Any) -> list[Any]:
    """The model's processor, and the tokenizer that the config was given, which is saved over it.

    A model without either is saved without, after a warning that says why.
    """
    given = [tokenizer] if hasattr(tokenizer, "save_pretrained") else []
    try:
        return [origin.processor(), *given]
    except OSError as error:
        if not given:
            logger.warning(f"the checkpoint will hold no tokenizer or processor: {error}")
        return given


def save(model: PreTrainedModel, output_dir: str | os.PathLike, processors: list[Any]) -> None:
    """Writes the packed checkpoint with its report and card, and the processors beside it."""
    model.save_pretrained(output_dir)
    for processor in processors:
        processor.save_pretrained(output_dir)


def _existing(path: str | os.PathLike) -> Path:
    """The path itself, or the nearest folder or file above it that exists."""
    absolute = Path(path).absolute()
    return next(part for part in (absolute, *absolute.parents) if os.path.lexists(part))
