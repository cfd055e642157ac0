"""The folder that a verb writes: checked before the work, filled after it."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..compression.experts import compressible_layers
from ..compression.linear_layers import weight_shape
from ..compression.model_structure import find_blocks
from ..compression.plan import Layer
from ..compression.run_folder import NAME as RUN_FOLDER
from ..data.origin import Origin
from ..format.checkpoint import CONFIG
from ..format.staging import weight_file
from ..utils.modules import tensor_bytes

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


def check_unused(output_dir: str | os.PathLike, overwrite: bool) -> None:
    """Checks that a folder holds no checkpoint that a run would replace; an unfinished run may be there.

    Raises:
        ValueError: it holds one, and `overwrite` is False.
    """
    folder = Path(output_dir)
    if overwrite or (folder / RUN_FOLDER).is_dir() or not folder.is_dir():
        return
    matches = weight_file().fullmatch
    found = [name for name in sorted(os.listdir(folder)) if matches(name) or name == CONFIG]
    if found:
        raise ValueError(
            f"output_dir={os.fspath(output_dir)!r} holds a checkpoint ({found[-1]}): pass another folder, or "
            "overwrite=True to replace it when the run is complete"
        )


def check_output(
    output_dir: str | os.PathLike,
    model: PreTrainedModel,
    plan: Mapping[str, Layer],
    origin: Origin,
    tokenizer: Any,
    keeps_blocks: bool = False,
) -> list[Any]:
    """Checks that everything that will be written can be.

    Args:
        model: dense, or its skeleton, in the dtype in which it will be loaded.
        tokenizer: the one that the config was given.
        keeps_blocks: finished blocks are stored until the run is complete (see `compression.run_folder`).

    Returns:
        The processors to save beside the model.

    Raises:
        OSError: too little space.
        ValueError: a config or generation config that transformers refuses to save.
    """
    _check_space(output_dir, stored_bytes(model, plan), _block_bytes(model, plan) if keeps_blocks else 0)
    _check_config(model.config, f"config of {_model_name(model, origin)!r}", "Change model.config")
    _check_generation_config(model, origin)
    return _processors(origin, tokenizer)


def _check_space(output_dir: str | os.PathLike, checkpoint: int, blocks: int) -> None:
    folder = Path(output_dir) / RUN_FOLDER
    stored = sum(file.stat().st_size for file in folder.glob("*")) if folder.is_dir() else 0
    free = shutil.disk_usage(_existing(output_dir)).free
    needed = checkpoint + max(blocks - stored, 0)
    parts = f"{checkpoint:,} for the checkpoint"
    if blocks:
        parts += f" and {max(blocks - stored, 0):,} for finished blocks until it is complete"
    if free < needed:
        field = f"output_dir={os.fspath(output_dir)!r}"
        raise OSError(f"{field}: expected {needed:,} bytes free ({parts}), found {free:,}")
    logger.info(f"{os.fspath(output_dir)} needs {needed:,} bytes: {parts}; {free:,} are free")


def _block_bytes(model: PreTrainedModel, plan: Mapping[str, Layer]) -> int:
    """Of the packed checkpoint, the bytes of the blocks."""
    blocks = find_blocks(model).values()
    inside = {id(tensor) for block in blocks for tensor in block.state_dict(keep_vars=True).values()}
    return stored_bytes(model, plan) - tensor_bytes(model, without=inside)


def stored_bytes(model: PreTrainedModel, plan: Mapping[str, Layer]) -> int:
    """Bytes of the packed checkpoint of a dense model, or of its skeleton, without the files' headers."""
    total, layers = tensor_bytes(model), compressible_layers(model)
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


def save(
    model: PreTrainedModel,
    output_dir: str | os.PathLike,
    processors: list[Any],
    state: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Writes the packed checkpoint with its report and card, and the processors beside it.

    Args:
        state: all tensors of the model, where it has none itself.
    """
    model.save_pretrained(output_dir, state_dict=state, max_shard_size=max_shard_size)
    for processor in processors:
        processor.save_pretrained(output_dir)


def _existing(path: str | os.PathLike) -> Path:
    """The path itself, or the nearest folder or file above it that exists."""
    absolute = Path(path).absolute()
    return next(part for part in (absolute, *absolute.parents) if os.path.lexists(part))
