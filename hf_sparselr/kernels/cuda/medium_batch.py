"""y = x S^T + (x A^T) B^T + bias for 17 to 512 rows of x and 2:4 on the sparse tensor cores, by `medium_batch.cu`."""

from collections.abc import Sequence

import torch

from ..launch import DriverLaunch, Varying
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from ..program import PerRows, Program
from ..support_index import index_of
from ..triton.decode import ceil_div, spread
from .low_rank import with_factors_and_parts
from .nvrtc import load_function

_STAGES = 3  # as in the source
_MOST_TILES = 16  # of eight rows of x that a warp has registers for


def supports_tiles(weight: PackedWeight) -> bool:
    """Whether a weight that `small_batch.supports` has the factors that the kernel reads: four entries at a time."""
    if not index_of(weight.mask, weight.in_features).pairs:
        return False
    return weight.A is None or (weight.rank % 4 == 0 and weight.B.data_ptr() % 8 == 0)


def bind_tiles(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """x S^T + (x A^T) B^T + bias of one weight, summed in FP32; x A^T is rounded once, as a product of torch's is. For
    up to `rows` rows of x, raised to a power of two."""
    (weight,) = weights
    mask, values, _, B, bias, ins = weight
    index, rank, device, outs = index_of(mask, ins), weight.rank, values.get_device(), weight.out_features
    tiles = min(_MOST_TILES, max(4, (1 << (rows - 1).bit_length()) // 8))
    span, split = spread(ins // 64, 1, config.split)
    defines = [f"ROWS={config.rows}", f"WARPS={config.warps}", f"TILES={tiles}", f"RESIDENT={config.resident}"]
    defines += ["HALF"] * (values.dtype == torch.float16) + ["BIAS"] * (bias is not None)
    defines += ["RANK"] * (rank > 0) + ["PARTS"] * (split > 1)
    shared = _STAGES * 8 * tiles * 128
    function = load_function("medium_batch.cu", "medium_batch", tuple(defines), device, shared)
    arguments = [
        Varying(0, None), index.words(mask), values, values if B is None else B, Varying(1, None),
        values if bias is None else bias, Varying(2, None), Varying(3, None), ins, outs, rank, span,
    ]  # fmt: skip
    grid = ceil_div(outs, config.rows * config.warps), split, PerRows(1, 8 * tiles)
    overlaps = rank > 0 and torch.cuda.get_device_capability(device) >= (9, 0)
    launch = DriverLaunch(function, (1, 1, 1), (32 * config.warps,), shared, arguments, overlaps)
    return with_factors_and_parts(rows, [weight], launch, grid, split)
