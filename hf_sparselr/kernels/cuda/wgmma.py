"""y = x S^T + (x A^T) B^T + bias for 2:4 on the sparse tensor cores of compute capability 9.0, by `wgmma.cu`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..launch import DriverLaunch, Varying
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from ..program import PerRows, Program
from ..support_index import index_of
from ..triton.decode import ceil_div
from .low_rank import with_factors_and_parts
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
    if torch.cuda.get_device_capability(weight.values.get_device()) != (9, 0):
        return False
    whole = weight.in_features % 16 == 0 and weight.rank % 8 == 0
    aligned = weight.B is None or weight.B.data_ptr() % 16 == 0
    return whole and aligned and index_of(weight.mask, weight.in_features).pairs and starts_with_address()


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


def bind_wgmma(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """x S^T + (x A^T) B^T + bias of one weight, summed in FP32; x A^T is rounded once, as a product of torch's is. For
    any number of rows of x."""
    (weight,) = weights
    mask, values, _, B, bias, ins = weight
    index, rank, device, outs = index_of(mask, ins), weight.rank, values.get_device(), weight.out_features
    tile = tile_of(config)
    defines = [f"WGS={config.rows // 64}", f"N={config.batch}", f"COLUMNS={tile.columns}", f"STAGES={tile.stages}"]
    defines += [f"CLUSTER={config.cluster}", f"PARTS={config.split}", f"RESIDENT={config.resident}"]
    defines += ["HALF"] * (values.dtype == torch.float16) + ["BIAS"] * (bias is not None) + ["RANK"] * (rank > 0)
    function = load_function("wgmma.cu", "wgmma", tuple(defines), device, tile.shared)
    own, x_box, u_box = (config.rows, tile.columns // 2), (tile.box, 64), (tile.box, tile.columns // 2)
    somewhere = values.data_ptr()  # for x and u, whose addresses a call gives
    S = tensor_map(values.data_ptr(), outs, ins // 2, own)
    x = [Varying(0, None), *tensor_map(somewhere, None, ins, x_box)[1:]]
    left = S if B is None else tensor_map(B.data_ptr(), outs, rank, own)
    u = [Varying(1, None), *tensor_map(somewhere, None, max(rank, 8), u_box)[1:]]
    span = ceil_div(ceil_div(ins, _CHUNK), config.split)
    arguments = [
        *S, *x, *left, *u, index.words(mask), values if bias is None else bias, Varying(2, None), Varying(3, None), ins,
        outs, rank, span,
    ]  # fmt: skip
    blocks, batches = ceil_div(outs, config.rows * config.cluster) * config.cluster, PerRows(1, config.batch)
    grid = (blocks, batches, 1) if config.split == 1 else (blocks, config.split, batches)
    launch = DriverLaunch(function, (1, 1, 1), (2 * config.rows + 32,), tile.shared, arguments, overlaps=rank > 0)
    return with_factors_and_parts(rows, weight, launch, grid, wide=True)
