"""Which plan is the fastest here for a product: measured once per device, kept on disk."""

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

from .index import SupportIndex
from .plan import TILES, VECTOR, Plan
from .timing import milliseconds

logger = logging.getLogger(__name__)

_MOST_ROWS = 8192  # of x that make a difference to what is the fastest


def known(rows: int, rank: int, index: SupportIndex, values: torch.Tensor) -> Plan | None:
    """What was chosen for such a product, or None if nothing was."""
    key = _bucket(rows), rank, values.dtype
    plan = index.plans.get(key)
    if plan is None:
        plan = _table(values.device).get(_name(rows, rank, index, values))
        if plan is not None:
            index.plans[key] = plan
    return plan


def choose(
    rows: int,
    rank: int,
    index: SupportIndex,
    values: torch.Tensor,
    options: Iterable[Plan],
    run: Callable[[Plan], torch.Tensor],
) -> Plan:
    """The fastest of the options.

    Args:
        rows: of x, at least 1; `rank`: of the factors, or 0.
        index, values: of S.
        run: computes the product by a plan.
    """
    times = {plan: milliseconds(functools.partial(run, plan), values.device) for plan in options}
    best = min(times, key=times.get)
    name = _name(rows, rank, index, values)
    logger.info("%s: %s is the fastest (ms: %s)", name, best, {str(p): round(t, 4) for p, t in times.items()})
    index.plans[_bucket(rows), rank, values.dtype] = _table(values.device)[name] = best
    _save(values.device)
    return best


def _bucket(rows: int) -> int:
    return min(1 << (rows - 1).bit_length(), _MOST_ROWS)


def _name(rows: int, rank: int, index: SupportIndex, values: torch.Tensor) -> str:
    outs, ins = index.shape[0], index.in_features
    kind = "2:4" if index.pairs else f"{index.nonzeros / (outs * ins):.1f}"
    dtype = str(values.dtype).removeprefix("torch.")
    return f"{outs}x{ins} {kind} rank {rank} {dtype} {_bucket(rows)}"


@functools.cache
def _file(device: torch.device) -> Path:
    """One per device model and set of candidates."""
    version = zlib.crc32(repr((VECTOR, TILES, torch.__version__)).encode())
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return Path(HF_HOME) / "hf_sparselr" / f"kernels-{name}-{version:08x}.json"


@functools.cache
def _table(device: torch.device) -> dict[str, Plan]:
    try:
        stored = json.loads(_file(device).read_text())
    except (OSError, ValueError):
        return {}
    return {key: Plan(**plan) for key, plan in stored.items()}


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
