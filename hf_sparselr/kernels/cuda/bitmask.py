"""y = x S^T + (x A^T) B^T + bias for any support on the tensor cores of compute capability 9.0, by `bitmask.cu`."""

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

_MOST_ROWS = 128  # of x that a block takes
_SHARED = 227 * 1024  # bytes that a block can have at most
_OF_ALL = 228 * 1024  # bytes of a multiprocessor
_TAKEN = 1024  # by the system, of each block's
_RECORDS = 16 * 48  # bytes of a warp's stage beside the values, as in the source
_LIST = 128  # of a warp, likewise
_PAD = 68  # likewise
_MOST_X_STAGES = 6
_SOMEWHERE = 2**20  # for x, whose address a call gives


def supports_bitmask(weight: PackedWeight) -> bool:
    """Whether a weight that `small_batch.supports` is one that the kernel reads: on compute capability 9.0."""
    capability = torch.cuda.get_device_capability(weight.values.get_device())
    return capability == (9, 0) and starts_with_address()


class Room(NamedTuple):
    """What a block has in shared memory.

    Attributes:
        stages: of values.
        x_stages: of x.
        shared: bytes in all.
    """

    stages: int
    x_stages: int
    shared: int


@functools.cache
def room_for(config: LaunchConfig, batch: int, stride: int) -> Room:
    """As many stages as fit.

    Raises:
        ValueError: not even the fewest do.
    """
    room = _SHARED if config.resident == 1 else _OF_ALL // config.resident - _TAKEN
    tall, wide = config.rows // 64, config.warps * 16 // config.rows
    x_stage = wide * (128 * batch + 16)
    for stages in (3, 2):
        own = config.warps * (stages * (16 * stride + _RECORDS) + _LIST)
        x_stages = min(_MOST_X_STAGES, (room - own) // x_stage)
        if x_stages >= 3:
            return Room(stages, x_stages, max(own + x_stages * x_stage, 4 * _PAD * tall * wide * batch))
    raise ValueError(f"{config} has no room for {batch} rows of x and {stride} bytes a row of S")


def bind_bitmask(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """x S^T + (x A^T) B^T + bias of one weight, summed in FP32; x A^T is rounded once, as a product of torch's is. For
    up to `rows` rows of x, raised to a power of two, and more than half of that.

    Raises:
        ValueError: a block of this configuration has no room for so many.
    """
    (weight,) = weights
    mask, values, _, B, bias, ins = weight
    index, rank, device, outs = index_of(mask, ins), weight.rank, values.get_device(), weight.out_features
    filled = min(_MOST_ROWS, 1 << (rows - 1).bit_length())
    batch, boxes, stride = max(8, filled), min(filled, max(2, config.cluster)), stride_of(index.densest)
    room = room_for(config, batch, stride)
    defines = [f"TALL={config.rows // 64}", f"WIDE={config.warps * 16 // config.rows}", f"N={batch}"]
    defines += [f"STAGES={room.stages}", f"STRIDE={stride}", f"X_STAGES={room.x_stages}", f"BOX={filled // boxes}"]
    defines += [f"BOXES={boxes}", f"CLUSTER={config.cluster}", f"PARTS={config.split}", f"RESIDENT={config.resident}"]
    defines += [f"PER_BLOCK={index.per_block}"] * (index.per_block > 0)
    defines += ["HALF"] * (values.dtype == torch.float16) + ["BIAS"] * (bias is not None)
    if B is not None:
        defines += ["RANK"] + ["EIGHTS"] * (rank % 8 == 0 and B.data_ptr() % 4 == 0)
    function = load_function("bitmask.cu", "bitmask", tuple(defines), device, room.shared)
    arguments = [
        Varying(0, None), *tensor_map(_SOMEWHERE, None, ins, (filled // boxes, 64))[1:], index.words(mask), values,
        index.starts, index.offsets, values if B is None else B, Varying(1, None), values if bias is None else bias,
        Varying(2, None), Varying(3, None), ins, outs, rank, index.shape[1], index.nonzeros, 0, 0,
    ]  # fmt: skip
    blocks = ceil_div(outs, config.rows * config.cluster) * config.cluster
    launch = DriverLaunch(function, (1, 1, 1), (32 * config.warps + 32,), room.shared, arguments, overlaps=rank > 0)
    return with_factors_and_parts(rows, [weight], launch, (blocks, config.split, PerRows(1, batch)), 1)


def stride_of(densest: int) -> int:
    """Bytes of shared memory for a row's values of 128 columns, at any multiple of two bytes: an odd number of units of
    16, so that eight rows start in banks of their own."""
    units = max(1, (min(densest, 128) + 14) // 8)
    return 16 * (units + 1 - units % 2)
