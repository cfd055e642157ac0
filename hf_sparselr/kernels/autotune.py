"""Finds the configuration that computes a product fastest on this device: measures once, and keeps the answer on disk.

Configurations are compared by the time that the GPU takes: the host takes about the same for each.
"""

import functools
import json
import logging
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

from . import launch_config
from .launch_config import LaunchConfig, bucket
from .packed_weight import PackedWeight
from .support_index import index_of
from .timing import milliseconds

logger = logging.getLogger(__name__)


_FEW_OUTS = 4096  # rows of S, below which their number makes no difference to what is the fastest
_TIE = 1.04  # of times that are as good as the same: the first of the options costs the host the least


def known(rows: int, weight: PackedWeight) -> LaunchConfig | None:
    """The choice for such a product; None if there is none yet."""
    return _table(weight.values.device).get(_name(rows, weight))


def choose(
    rows: int,
    weight: PackedWeight,
    options: Iterable[LaunchConfig],
    run: Callable[[LaunchConfig], list[torch.Tensor]],
) -> LaunchConfig:
    """The fastest of the options, which is kept.

    Args:
        rows: of x, at least 1.
        run: computes the product by a configuration.
    """
    device, name = weight.values.device, _name(rows, weight)
    times = {config: milliseconds(functools.partial(run, config), device) for config in options}
    fastest = min(times.values())
    best = next(config for config, time in times.items() if time <= _TIE * fastest)
    logger.info("%s: %s is the fastest (ms: %s)", name, best, {str(c): round(t, 4) for c, t in times.items()})
    _table(device)[name] = best
    _save(device)
    return best


def _name(rows: int, weight: PackedWeight) -> str:
    index, dtype = index_of(weight.mask, weight.in_features), str(weight.values.dtype).removeprefix("torch.")
    # Layers that may share a launch share a choice: q, k and v differ in their rows.
    outs, ins = max(weight.out_features, _FEW_OUTS), weight.in_features
    kind = "2:4" if index.pairs else f"{index.nonzeros / (weight.out_features * ins):.1f}"
    return f"{outs}x{ins} {kind} rank {weight.rank} {dtype} {bucket(rows)}"


@functools.cache
def _file(device: torch.device) -> Path:
    """One per device model and set of candidates."""
    version = zlib.crc32(repr((launch_config.TABLE, torch.__version__)).encode())
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return Path(HF_HOME) / "hf_sparselr" / f"kernels-{name}-{version:08x}.json"


@functools.cache
def _table(device: torch.device) -> dict[str, LaunchConfig]:
    try:
        stored = json.loads(_file(device).read_text())
        return {key: LaunchConfig(**config) for key, config in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # no file, or a damaged one: measure again


def _save(device: torch.device) -> None:
    """Adds a measurement to the file; a directory that cannot be written only costs measuring again."""
    file = _file(device)
    configs = {key: asdict(config) for key, config in _table(device).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as target:
            json.dump(configs, target, indent=1)
        Path(target.name).replace(file)
    except OSError as error:
        logger.info("kernel timings are not kept: %s", error)
