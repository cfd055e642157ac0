"""The fastest configurations on cards that were measured. On these, nothing is measured again.

On one H100 80GB HBM3, layers of 14336 x 4096, 4096 x 14336 and 4096 x 4096, rank 64, BF16 (2026-11-27). An H200 has the
same multiprocessors: there, measurements chose the same for one row of the first two, and others for many rows
(2026-11-28).
"""

import functools

import torch

from .launch_config import BESIDE, GEMV, JOINED, MEDIUM_BATCH, MMA, MMA_PAIRS, MOST_ROWS, TILES, LaunchConfig

_MANY_OUTS = 8192  # rows of S that keep a GPU busy without splitting the columns

_WHOLE, _, _QUARTERS, _EIGHTHS = MEDIUM_BATCH  # parts of the columns
_WIDE, _WIDE_HALVES, _WIDE_QUARTERS, *_, _NARROW_QUARTERS, _NARROW_EIGHTHS = TILES


# Up to so many rows of x: the configuration for many rows of S, and for few.
_PAIRS = (
    (1, GEMV[0], GEMV[0]),
    (16, MMA_PAIRS[0], MMA_PAIRS[0]),
    (32, _NARROW_QUARTERS, _NARROW_EIGHTHS),
    (64, _WIDE_HALVES, _NARROW_QUARTERS),
    (128, _WIDE_HALVES, _WIDE_QUARTERS),
    (256, _WIDE, _WIDE_QUARTERS),
    (MOST_ROWS, JOINED, JOINED),
)
_OTHER = (
    (1, GEMV[0], GEMV[0]),
    (16, MMA[1], MMA[1]),
    (32, _QUARTERS, _EIGHTHS),
    (64, _QUARTERS, _QUARTERS),
    (128, _WHOLE, _QUARTERS),
)
_CARDS = {
    "NVIDIA H100": {"2:4": _PAIRS, "other": (*_OTHER, (MOST_ROWS, JOINED, JOINED))},
    "NVIDIA H200": {
        "2:4": _PAIRS,
        "other": (*_OTHER, (1024, BESIDE, BESIDE), (2048, BESIDE, JOINED), (MOST_ROWS, JOINED, JOINED)),
    },
}


def measured(rows: int, outs: int, pairs: bool, device: torch.device) -> LaunchConfig | None:
    """The configuration for so many rows of x and of S, of 16 bits, where there are kernels in CUDA C++.

    None for a card that was not measured.
    """
    for most, many, few in _table(device, pairs):
        if min(rows, MOST_ROWS) <= most:
            return many if outs > _MANY_OUTS else few
    return None


@functools.cache
def _table(device: torch.device, pairs: bool) -> tuple:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for card, tables in _CARDS.items():
        if name.startswith(card):
            return tables["2:4" if pairs else "other"]
    return ()
