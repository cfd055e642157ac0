"""Which kernel is the fastest here for a product: measured once per device, kept on disk."""

import functools
import json
import logging
import re
import statistics
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

from .decode import MAX_ROWS, Plan
from .index import SupportIndex

logger = logging.getLogger(__name__)

MOST_PACKED_ROWS = 4 * MAX_ROWS  # above, the dense product is bound by arithmetic

_VECTOR = (Plan(False, 4, 4, 8), Plan(False, 4, 4, 4), Plan(False, 2, 8, 8), Plan(False, 8, 4, 4))
_MATRIX = (
    Plan(True, 16, 2, 8),
    Plan(True, 16, 1, 4),
    Plan(True, 16, 2, 4, split=4),
    Plan(True, 8, 1, 8, split=4),
)
_REPEATS = 20


def candidates(rows: int, dtype: torch.dtype) -> tuple[Plan, ...]:
    """What is worth trying for so many rows of x: the first is taken where nothing can be measured."""
    if dtype.itemsize != 2:  # each row of x reads S again
        return _VECTOR if rows <= 4 else ()
    return (*_VECTOR, *_MATRIX) if rows == 1 else _MATRIX


def chosen(rows: int, index: SupportIndex, values: torch.Tensor) -> Plan | None:
    """What `choose` has chosen for such a product."""
    return _table(values.device).get(_key(rows, index, values))


def _bucket(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


def _key(rows: int, index: SupportIndex, values: torch.Tensor) -> str:
    outs, ins = index.shape[0], index.in_features
    kind = "2:4" if index.pairs else f"{index.nonzeros / (outs * ins):.1f}"
    return f"{outs}x{ins} {kind} {str(values.dtype).removeprefix('torch.')} {_bucket(rows)}"


def choose(
    rows: int, index: SupportIndex, values: torch.Tensor, run: Callable[[Plan | None], torch.Tensor]
) -> Plan | None:
    """The fastest plan for this product, or None: the dense product of an unpacked copy.

    Args:
        rows: of x, at least 1.
        index, values: of S.
        run: computes the product by a plan.
    """
    if rows > MOST_PACKED_ROWS:
        return None
    table, key = _table(values.device), _key(rows, index, values)
    if key in table:
        return table[key]
    options = (*candidates(_bucket(rows), values.dtype), None)
    if torch.cuda.is_current_stream_capturing():
        return options[0]
    times = {option: milliseconds(functools.partial(run, option), values.device) for option in options}
    table[key] = min(times, key=times.get)
    logger.info(
        "%s: %s is the fastest (ms: %s)", key, table[key], {str(k): round(v, 4) for k, v in times.items()}
    )
    _save(values.device)
    return table[key]


def milliseconds(run: Callable[[], torch.Tensor], device: torch.device, repeats: int = _REPEATS) -> float:
    """Median time of a call whose weights come from memory, as they do in a model.

    The L2 cache is flushed before each call, several times over: so long is the GPU busy while the host launches.
    """
    flush = torch.empty(
        2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device
    )
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(8):
            flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@functools.cache
def _file(device: torch.device) -> Path:
    """One per device model and set of candidates."""
    version = zlib.crc32(repr((_VECTOR, _MATRIX, torch.__version__)).encode())
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return Path(HF_HOME) / "hf_sparselr" / f"kernels-{name}-{version:08x}.json"


@functools.cache
def _table(device: torch.device) -> dict[str, Plan | None]:
    try:
        stored = json.loads(_file(device).read_text())
    except (OSError, ValueError):
        return {}
    return {key: plan and Plan(**plan) for key, plan in stored.items()}


def _save(device: torch.device) -> None:
    """Adds what was measured to the file; a directory that cannot be written only costs measuring again."""
    file = _file(device)
    plans = {key: plan and asdict(plan) for key, plan in _table(device).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as target:
            json.dump(plans, target, indent=1)
        Path(target.name).replace(file)
    except OSError as error:
        logger.info("kernel timings are not kept: %s", error)
