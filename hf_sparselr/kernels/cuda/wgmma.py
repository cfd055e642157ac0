"""y = x S^T + (x A^T) B^T + bias for 2:4 on the sparse tensor cores of compute capability 9.0, by `wgmma.cu`."""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..launch import DriverLaunch, Varying
from ..launch_config import LaunchConfig, bucket
from ..packed_weight import PackedWeight
from ..program import PerRows, Program
from ..support_index import index_of
from ..triton.decode import ceil_div
from .low_rank import wide_shape, with_factors_and_parts
from .nvrtc import load_function
from .tensor_map import starts_with_address, tensor_map

_SHARED = 228 * 1024  # bytes of a multiprocessor
_TAKEN = 2 * 1024  # of each block's: by the system, and to begin at a multiple of 1024
_CODES = 64  # bytes for a row of S
_BARRIERS = 16  # bytes for a stage
_MOST_STAGES = 12
_CHUNK = 256  # columns whose mask is read together


def supports_wgmma(weight: PackedWeight) -> bool:
    """Whether a weight that `small_batch.supports` is one that the kernel reads: on compute capability 9.0, at 2:4,
    rows of values, inputs and factors that begin at multiples of 16 bytes."""
    pairs = index_of(weight.mask, weight.in_features).pairs
    if not pairs or torch.cuda.get_device_capability(weight.values.get_device()) != (9, 0):
        return False
    whole = weight.in_features % 16 == 0 and weight.rank % 8 == 0
    aligned = weight.B is None or weight.B.data_ptr() % 16 == 0
    return whole and aligned and starts_with_address()


class Tile(NamedTuple):
    """What a block has in shared memory.

    Attributes:
        box: rows of x that are brought together.
        columns: of a stage.
        stages: that are under way.
        shared: bytes in all.
    """

    box: int
    columns: int
    stages: int
    shared: int


@functools.cache
def tile_of(config: LaunchConfig) -> Tile:
    """As many stages of 128 columns as there is room for, or of 64 where these would be less than four."""
    room = _SHARED // config.resident - _TAKEN - _CODES * config.rows
    widths = {columns: columns * (config.rows + 2 * config.batch) + _BARRIERS for columns in (128, 64)}
    columns = 128 if room // widths[128] >= 4 else 64
    stages = min(room // widths[columns], _MOST_STAGES)
    box = config.batch // max(2, config.cluster)
    return Tile(box, columns, stages, stages * widths[columns] + _CODES * config.rows + _TAKEN // 2)


def kind_of(weight: PackedWeight) -> tuple:
    """The properties that weights must share to share a launch."""
    return weight.rank > 0, weight.bias is None


def bind_wgmma(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """x S^T + (x A^T) B^T + bias of every weight, summed in FP32; x A^T is rounded once, as a product of torch's is.

    For any number of rows of x.

    Args:
        weights: at most `LaunchConfig.shares`, of one kind (`kind_of`).
    """
    one, ins, device = weights[0], weights[0].in_features, weights[0].values.get_device()
    tile, count = tile_of(config), len(weights)
    defines = [f"WEIGHTS={count}", f"WGS={config.rows // 64}", f"N={config.batch}", f"COLUMNS={tile.columns}"]
    defines += [f"STAGES={tile.stages}", f"CLUSTER={config.cluster}", f"PARTS={config.split}"]
    defines += [f"RESIDENT={config.resident}", *["HALF"] * (one.values.dtype == torch.float16)]
    defines += ["BIAS"] * (one.bias is not None) + ["RANK"] * (one.rank > 0)
    function = load_function("wgmma.cu", "wgmma", tuple(defines), device, tile.shared)
    ends = list(accumulate(ceil_div(weight.out_features, config.rows * config.cluster) for weight in weights))
    x = tensor_map(one.values.data_ptr(), None, ins, (tile.box, 64))  # a call gives its address
    arguments = [Varying(0, None), *x[1:]]
    for number, (weight, end) in enumerate(zip(weights, ends, strict=True)):
        arguments += _arguments(weight, config, Varying(1 + number, None), Varying(1 + count + number, None), end)
    arguments += [Varying(1 + 2 * count, None), ins, ceil_div(ceil_div(ins, _CHUNK), config.split), *[0] * 5]
    blocks, batches = ends[-1] * config.cluster, PerRows(1, config.batch)
    grid = (blocks, batches, 1) if config.split == 1 else (blocks, config.split, batches)
    threads = 2 * config.rows + 32
    launch = DriverLaunch(function, (1, 1, 1), (threads,), tile.shared, arguments, overlaps=one.rank > 0)
    total, ranks = blocks * config.split * batches.at(bucket(rows)), [weight.rank for weight in weights]
    wide = wide_shape(bucket(rows), ranks, total, torch.cuda.get_device_properties(device).multi_processor_count)
    return with_factors_and_parts(rows, weights, launch, grid, wide=wide)


def _arguments(weight: PackedWeight, config: LaunchConfig, u: Varying, y: Varying, end: int) -> list[Any]:
    """A `Weight` of the source, in words.

    Args:
        u, y: their addresses.
        end: see there, `last`.
    """
    mask, values, _, B, bias, ins = weight
    tile, outs, rank = tile_of(config), weight.out_features, weight.rank
    own = config.rows, tile.columns // 2
    S = tensor_map(values.data_ptr(), outs, ins // 2, own)
    left = S if B is None or not rank else tensor_map(B.data_ptr(), outs, rank, own)
    right = tensor_map(values.data_ptr(), None, max(rank, 8), (tile.box, tile.columns // 2))
    words = index_of(mask, ins).words(mask)
    return [*S, *left, u, *right[1:], words, values if bias is None else bias, y, outs, rank, end, 0, 0]
