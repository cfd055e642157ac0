"""Which plan is the fastest here for a product: measured once per device, kept on disk.

By the time that the GPU takes, as the host is ahead of it. Not with cuSPARSELt, which takes the host longer than most
layers take the GPU: it is judged by the longer of the two times, but for CUDA graphs.
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

from .launch_config import BLOCKS, MOST_BLOCK_ROWS, SPARSE, TILES, VECTOR, Plan
from .timing import host_milliseconds, milliseconds
from .triton.decode import Packed

logger = logging.getLogger(__name__)

_MOST_ROWS = 8192  # of x that make a difference to what is the fastest


def known(rows: int, layer: Packed, captured: bool) -> Plan | None:
    """What was chosen for such a product, in a CUDA graph or not, or None if nothing was."""
    key, plans = _key(rows, layer, captured), layer.index.plans
    plan = plans.get(key)
    if plan is None:
        plan = _table(layer.values.device).get(_name(rows, layer, captured))
        if plan is not None:
            plans[key] = plan
    return plan


def choose(
    rows: int, layer: Packed, options: Iterable[Plan], run: Callable[[Plan], list[torch.Tensor]]
) -> Plan:
    """The fastest of the options outside of a CUDA graph. Keeps that and the fastest in one.

    Args:
        rows: of x, at least 1.
        run: computes the product by a plan.
    """
    device = layer.values.device
    times = {plan: milliseconds(functools.partial(run, plan), device) for plan in options}
    _keep(rows, layer, True, times)
    for plan in times:
        if plan.form in SPARSE:
            times[plan] = max(times[plan], host_milliseconds(functools.partial(run, plan), device))
    best = _keep(rows, layer, False, times)
    _save(device)
    return best


def _keep(rows: int, layer: Packed, captured: bool, times: dict[Plan, float]) -> Plan:
    best, name = min(times, key=times.get), _name(rows, layer, captured)
    logger.info("%s: %s is the fastest (ms: %s)", name, best, {str(p): round(t, 4) for p, t in times.items()})
    layer.index.plans[_key(rows, layer, captured)] = _table(layer.values.device)[name] = best
    return best


def _key(rows: int, layer: Packed, captured: bool) -> tuple:
    return _bucket(rows), layer.rank, layer.values.dtype, captured and rows > MOST_BLOCK_ROWS


def _bucket(rows: int) -> int:
    return min(1 << (rows - 1).bit_length(), _MOST_ROWS)


def _name(rows: int, layer: Packed, captured: bool) -> str:
    index, dtype = layer.index, str(layer.values.dtype).removeprefix("torch.")
    outs, ins = index.shape[0], index.in_features
    graph = " in a graph" if captured and rows > MOST_BLOCK_ROWS else ""
    kind = "2:4" if index.pairs else f"{index.nonzeros / (outs * ins):.1f}"
    return f"{outs}x{ins} {kind} rank {layer.rank} {dtype} {_bucket(rows)}{graph}"


@functools.cache
def _file(device: torch.device) -> Path:
    """One per device model and set of candidates."""
    version = zlib.crc32(repr((VECTOR, TILES, BLOCKS, MOST_BLOCK_ROWS, SPARSE, torch.__version__)).encode())
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return Path(HF_HOME) / "hf_sparselr" / f"kernels-{name}-{version:08x}.json"


@functools.cache
def _table(device: torch.device) -> dict[str, Plan]:
    try:
        stored = json.loads(_file(device).read_text())
        return {key: Plan(**plan) for key, plan in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # no file, or not what was written: measure again


def _save(device: torch.device) -> None:
    """Adds what was measured to the file; a directory that cannot be written only costs measuring again."""
    file = _file(device)
    plans = {key: asdict(plan) for key, plan in _table(device).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as target:
            json.dump(plans, target, indent=1)
        Path(target.name).replace(file)
    except OSError as error:
        logger.info("kernel timings are not kept: %s", error)
