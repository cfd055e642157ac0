"""y = x S^T + (x A^T) B^T + bias for up to four rows of x and any support on the tensor cores, by `vector.cu`."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from ..launch import DriverLaunch, Varying
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from ..program import Program
from ..support_index import SupportIndex, index_of
from ..triton.decode import ceil_div
from . import small_batch
from .low_rank import with_factors_and_parts
from .nvrtc import load_function

_STEP = 128  # columns, as in the source
_MOST_STEPS = 8  # of a warp, likewise
_MOST_WARPS = 16
_RECORDS = 512  # bytes of a warp beside the values, likewise
_ROWS_OF_WARP = 32  # of S, likewise
_TABLE = 128  # bytes before the values, likewise
_BEYOND = 2 * _STEP * _MOST_STEPS + 128  # after them: as much as a block may read of a mask edited unseen by torch


def supports_vector(weight: PackedWeight) -> bool:
    """Whether a weight that `small_batch.supports` is one that the kernel reads: on compute capability 9.0."""
    if torch.cuda.get_device_capability(weight.values.get_device()) != (9, 0):
        return False
    return weight.in_features <= _STEP * _MOST_STEPS * _MOST_WARPS


def kind_of(weight: PackedWeight, index: SupportIndex) -> tuple:
    """The properties that weights must share to share a launch."""
    return *small_batch.kind_of(weight, index), _in_eights(weight), weight.rank > 0


def _in_eights(weight: PackedWeight) -> bool:
    """Whether rows of B and u can be read eight entries at a time."""
    return weight.rank % 8 == 0 and (weight.B is None or weight.B.data_ptr() % 16 == 0)


class Shape(NamedTuple):
    """Of a block, as the source names it."""

    slices: int
    steps: int
    groups: int
    top: int


def shape_of(outs: Sequence[int], ins: int, warps: int, multiprocessors: int) -> Shape:
    """Columns in as few slices as registers allow, and rows shared out evenly; one block a multiprocessor at a time."""
    slices = ceil_div(ins, _STEP * _MOST_STEPS)
    groups = max(1, warps // slices)
    if groups == 1:
        slices = max(slices, min(warps, ceil_div(ins, _STEP)))
    steps = ceil_div(ins, _STEP * slices)
    tops = range(2, _ROWS_OF_WARP * groups + 1, 2)

    def cost(top: int) -> int:  # rows that a multiprocessor takes, and some work for each block
        return ceil_div(sum(ceil_div(out, top) for out in outs), multiprocessors) * (top + 16)

    return Shape(ceil_div(ins, _STEP * steps), steps, groups, min(tops, key=cost))


def bind_vector(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """x S^T + (x A^T) B^T + bias of every weight, summed in FP32; x A^T is rounded once, as a product of torch's is.

    Args:
        rows: of x, 1 to 4.
        weights: of one kind (`kind_of`).
    """
    one, device = weights[0], weights[0].values.get_device()
    indices = [index_of(weight.mask, weight.in_features) for weight in weights]
    outs, ins = tuple(weight.out_features for weight in weights), one.in_features
    shape = shape_of(outs, ins, config.warps, torch.cuda.get_device_properties(device).multi_processor_count)
    warps = shape.slices * shape.groups
    # Where warps take turns with rows of S, the kernel for one row of x is slower than that for two (NOTES.md).
    batch = 4 if rows > 2 else 2 if rows == 2 or shape.groups > 1 else 1
    densest = ceil_div(max(index.densest for index in indices), 8) * 8  # alike for supports of one density
    stride = (min(densest, _STEP) * shape.steps + 14) // 8 * 16
    shared = _TABLE + warps * (config.ahead * 2 * stride + _RECORDS) + 32 * batch * shape.slices * shape.top + _BEYOND
    defines = [f"{name.upper()}={value}" for name, value in shape._asdict().items()]
    defines += [f"WEIGHTS={len(weights)}", f"BATCH={batch}", f"STAGES={config.ahead}", f"STRIDE={stride}"]
    defines += [f"PER_BLOCK={indices[0].per_block}"] * (indices[0].per_block > 0)
    defines += ["HALF"] * (one.values.dtype == torch.float16) + ["BIAS"] * (one.bias is not None)
    if one.B is not None:
        defines += ["RANK"] + ["EIGHTS"] * _in_eights(one)
    blocks = list(accumulate(ceil_div(out, shape.top) for out in outs))
    function = load_function("vector.cu", "vector", tuple(defines), device, shared)
    count = len(outs)
    arguments = [Varying(0, None), Varying(1 + 2 * count, None), ins, indices[0].shape[1]]
    for number, (weight, index, end) in enumerate(zip(weights, indices, blocks, strict=True)):
        B, bias = (weight.values if tensor is None else tensor for tensor in (weight.B, weight.bias))
        arguments += [
            index.words(weight.mask), weight.values, index.starts, index.offsets, B, Varying(1 + number, None), bias,
            Varying(1 + count + number, None), weight.out_features, weight.rank, index.nonzeros, end,
        ]  # fmt: skip
    launch = DriverLaunch(function, (blocks[-1],), (32 * warps,), shared, arguments, overlaps=one.rank > 0)
    return with_factors_and_parts(rows, weights, launch, (blocks[-1], 1, 1))
