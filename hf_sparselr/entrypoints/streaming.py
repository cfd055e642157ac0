"""Whether a run reads its model block by block."""

import logging
import os
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from ..compression.expert_products import unknown_products
from ..config.sparselr_config import SparseLRConfig
from ..utils.memory import available_memory
from ..utils.modules import tensor_bytes
from ..utils.world import World
from .memory_needs import distillation_bytes

logger = logging.getLogger("hf_sparselr")


def is_streamed(
    stream: bool | str,
    given: PreTrainedModel | None,
    skeleton: PreTrainedModel,
    plan: Iterable[str],
    config: SparseLRConfig,
    output_dir: str | os.PathLike | None,
    load_kwargs: dict[str, Any],
    world: World,
) -> bool:
    """Decides about `stream`: True, False or "auto". All processes decide alike.

    Raises:
        ValueError: another value; True where something stands against it.
    """
    if not isinstance(stream, bool) and stream != "auto":
        raise ValueError(f"stream={stream!r}: expected True, False or 'auto'")
    if not stream:
        return False
    size, shares = tensor_bytes(skeleton), ""
    if stream == "auto":
        free = world.of_first(available_memory())
        if given is not None or free is None or size * world.size <= free / 2:
            return False
        shares = f"{size / 1e9:.1f} GB of {free / 1e9:.1f} GB of free memory"
    obstacle = _obstacle(given, skeleton, plan, config, output_dir, load_kwargs, size)
    if obstacle is not None and stream is True:
        raise ValueError(f"stream=True: {obstacle}")
    if obstacle is not None:
        logger.warning(f"the model takes {shares}, and is not streamed: {obstacle}")
    return obstacle is None


def are_read_by_block(files: list[str], stream: bool | str) -> bool:
    """Whether weight files can be read block by block.

    Raises:
        ValueError: they cannot, and `stream` is True.
    """
    if all(file.endswith(".safetensors") for file in files):
        return True
    problem = f"blocks are read from .safetensors files, found {os.path.basename(files[0])}: convert the checkpoint"
    if stream is True:
        raise ValueError(f"stream=True: {problem}, or use stream=False")
    logger.warning(f"the model is not streamed: {problem}")
    return False


def _obstacle(
    given: PreTrainedModel | None,
    skeleton: PreTrainedModel,
    plan: Iterable[str],
    config: SparseLRConfig,
    output_dir: str | os.PathLike | None,
    load_kwargs: dict[str, Any],
    size: int,
) -> str | None:
    """What stands against reading block by block, and what to do about it."""
    if given is not None:
        return "it reads the files of a model, but a model in memory was given: pass its name or directory"
    if output_dir is None:
        return "finished blocks go to files: pass output_dir"
    if "distill" in config.refine_steps:
        device = distillation_bytes(skeleton, config)
        return (
            f"refine={config.refine!r} trains the whole model, and needs about {size * 2 / 1e9:.1f} GB of main memory "
            f"and {device / 1e9:.1f} GB on the device: use refine='tm', or stream=False, there with "
            'distill={"train": "factors"} if memory is short'
        )
    if isinstance(config.calibration, str) and config.calibration == "self":
        return "calibration='self' lets the whole dense model write text: pass data, or text that it wrote before"
    if load_kwargs.get("device_map") is not None:
        return "device_map places whole models: leave it out"
    if experts := unknown_products(skeleton, plan):
        return f"how {experts[0]} is multiplied is only seen in a pass of the dense model: use stream=False"
    return None
