"""y = x S^T + (x A^T) B^T + bias for up to 32 rows of x on the tensor cores, by `small_batch.cu`."""

import functools
import logging
from collections.abc import Sequence
from itertools import accumulate

import torch

from ..bindings import Product
from ..launch import COUNTERS, DriverLaunch, Varying, drives, empty, scratch
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from ..support_index import SupportIndex, index_of
from .nvrtc import CompileError, load_function

logger = logging.getLogger(__name__)

_STAGES = 2  # as in the source
_STEP = 128  # columns, likewise
_TABLE = 128  # bytes of shared memory before the values
_BEYOND = 512  # after them: as much as a block may read of a mask that was edited unseen by torch
_SHARED = 227 * 1024  # bytes that a block can have at most, on compute capability 9.0


def supports(weight: PackedWeight, index: SupportIndex) -> bool:
    """Whether there is such a kernel for a weight here."""
    values, ins = weight.values, weight.in_features
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (values, weight.A) if tensor is not None)
    room = index.pairs or shared_memory(8, 16, index.densest) <= _SHARED
    fits = values.element_size() == 2 and ins % 8 == 0 and ins < 2**16 and aligned and room
    return fits and values.is_cuda and drives() and _compiles(values.get_device())


@functools.cache
def _compiles(device: int) -> bool:
    """Whether NVRTC is there and compiles for a device; says so once if not."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        defines = ("WEIGHTS=1", "ROWS=16", "WARPS=4", "RESIDENT=1", "AHEAD=1", "TILES=1", "PAIRS")
        load_function("small_batch.cu", "small_batch", defines, device, 0)
    except (CompileError, OSError) as error:
        logger.warning("packed layers run without the kernels in CUDA C++, by Triton's alone: %s", error)
        return False
    return True


def kind_of(weight: PackedWeight, index: SupportIndex) -> tuple:
    """The properties that weights must share to share a launch."""
    return index.pairs, index.per_block, weight.A is None, weight.bias is None, in_fours(weight)


def in_fours(weight: PackedWeight) -> bool:
    """Whether B u is one more product of the tensor cores: rows of B can be read four entries at a time, in BF16."""
    whole = weight.A is not None and weight.rank % 4 == 0 and weight.B.data_ptr() % 8 == 0
    return whole and weight.values.dtype == torch.bfloat16


def bind_mma(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Product:
    """x S^T + (x A^T) B^T + bias of every weight, summed in FP32.

    Args:
        rows: of x, 1 to 32.
        weights: of one kind (`kind_of`) that is supported (`supports`).
    """
    one, device = weights[0], weights[0].values.get_device()
    indices = [index_of(weight.mask, weight.in_features) for weight in weights]
    tiles, low_rank = 1 if rows <= 8 else 2 if rows <= 16 else 4, one.A is not None
    batch = 8 * tiles
    densest, shared = max(index.densest for index in indices), 4 * config.warps * batch * config.rows
    if not indices[0].pairs:
        shared = max(shared, shared_memory(config.warps, config.rows, densest))
    defines = [f"WEIGHTS={len(weights)}", f"ROWS={config.rows}", f"WARPS={config.warps}", f"TILES={tiles}"]
    defines += [f"RESIDENT={config.resident}", f"AHEAD={config.ahead}"]
    defines += ["PAIRS"] if indices[0].pairs else [f"STRIDE={stride_of(densest)}"]
    if indices[0].per_block and not indices[0].pairs:
        defines.append(f"PER_BLOCK={indices[0].per_block}")
    defines += ["HALF"] * (one.values.dtype == torch.float16) + ["BIAS"] * (one.bias is not None)
    defines += ["RANK"] * low_rank + ["FOURS"] * in_fours(one)
    outs, ranks = [weight.out_features for weight in weights], [weight.rank for weight in weights]
    places = [0, *accumulate(-(-rows * rank // 8) * 8 for rank in ranks)]  # of each weight in u
    blocks = list(accumulate(-(-out // config.rows) for out in outs))
    # Varying: x, u, the counters of a fused launch, how many of its blocks compute u, and each y.
    arguments = [Varying(0, None), Varying(1, None), rows, one.in_features, indices[0].shape[1]]
    arguments += [Varying(2, None), Varying(3, None)]
    for number, (weight, index) in enumerate(zip(weights, indices, strict=True)):
        arguments += [
            index.words(weight.mask), weight.values, index.starts, index.offsets,
            *(weight.values if tensor is None else tensor for tensor in (weight.B, weight.bias)),
            Varying(4 + number, None), outs[number], ranks[number], places[number], index.nonzeros, blocks[number],
            weight.values if weight.A is None else weight.A,
        ]  # fmt: skip
    load = functools.partial(load_function, "small_batch.cu", defines=tuple(defines), device=device)
    block, total = (32 * config.warps,), sum(ranks)
    main = load("small_batch", shared=shared)
    if not low_rank:
        launch = DriverLaunch(main, (blocks[-1],), block, shared, arguments)

        def product(inputs: torch.Tensor, _: int, weights: Sequence[PackedWeight]) -> list[torch.Tensor]:
            ys = empty(inputs, outs)
            launch(inputs, 0, 0, 0, *ys)
            return ys

        return product
    fused = DriverLaunch(main, (total + blocks[-1],), block, shared, arguments)
    overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
    second = DriverLaunch(main, (blocks[-1],), block, shared, arguments, overlaps)
    first = DriverLaunch(load("low_rank", shared=shared), (total,), block, shared, arguments)

    def fused_product(inputs: torch.Tensor, _: int, weights: Sequence[PackedWeight]) -> list[torch.Tensor]:
        ys = empty(inputs, outs)
        memory = scratch(device, COUNTERS + 4 * places[-1])
        if memory is None:
            u = torch.empty(places[-1], dtype=torch.float32, device=inputs.device)
            first(inputs, u, 0, 0, *ys)
            second(inputs, u, 0, 0, *ys)
        else:  # the counters are zero between launches
            fused(inputs, memory + COUNTERS, memory, total, *ys)
        return ys

    return fused_product


def stride_of(densest: int) -> int:
    """Bytes of shared memory for the values of a row's step: at any multiple of two bytes, read to one beyond."""
    return -(-(2 * densest + 16) // 16) * 16


def shared_memory(warps: int, rows: int, densest: int) -> int:
    return _TABLE + warps * _STAGES * rows * stride_of(densest) + _BEYOND
