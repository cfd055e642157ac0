"""y = x S^T + (x A^T) B^T + bias for up to 32 rows of x on the tensor cores, by `small_batch.cu`."""

import functools
import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from ..launch import DriverLaunch, Varying, drives
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from ..program import Launch, Memory, Program, X, y
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


def bind_mma(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
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
    outs, ranks = tuple(weight.out_features for weight in weights), [weight.rank for weight in weights]
    places = [0, *accumulate(-(-rows * rank // 8) * 8 for rank in ranks)]  # of each weight in u
    blocks = list(accumulate(-(-out // config.rows) for out in outs))
    weight_arguments = []
    for number, (weight, index) in enumerate(zip(weights, indices, strict=True)):
        weight_arguments += [
            index.words(weight.mask), weight.values, index.starts, index.offsets,
            *(weight.values if tensor is None else tensor for tensor in (weight.B, weight.bias)),
            Varying(1 + number, None), outs[number], ranks[number], places[number], index.nonzeros, blocks[number],
            weight.values if weight.A is None else weight.A,
        ]  # fmt: skip
    load = functools.partial(load_function, "small_batch.cu", defines=tuple(defines), device=device)
    block, total, last = (32 * config.warps,), sum(ranks), 1 + len(outs)

    def launch(name: str, grid: int, u: Any, counters: Any, projecting: int, overlaps: bool = False) -> DriverLaunch:
        sizes = [rows, one.in_features, indices[0].shape[1]]
        arguments = [Varying(0, None), u, *sizes, counters, projecting, *weight_arguments]
        return DriverLaunch(load(name, shared=shared), (grid,), block, shared, arguments, overlaps)

    results = tuple(map(y, range(len(outs))))
    if not low_rank:
        step = Launch(launch("small_batch", blocks[-1], 0, 0, 0), (X, *results))
        return Program(outs, (), (step,))
    fused = launch("small_batch", total + blocks[-1], Varying(last, None), Varying(last + 1, None), total)
    first = launch("low_rank", total, Varying(last, None), 0, 0)
    overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
    second = launch("small_batch", blocks[-1], Varying(last, None), 0, 0, overlaps)
    u = Memory(torch.float32, places[-1])
    slots = (X, *results, 2 + len(outs))
    captured = Program(outs, (u,), (Launch(first, slots), Launch(second, slots)))
    counters = Memory(torch.float32, counters=True)
    return Program(outs, (u._replace(shared=True), counters), (Launch(fused, (*slots, 3 + len(outs))),), captured)


def stride_of(densest: int) -> int:
    """Bytes of shared memory for the values of a row's step: at any multiple of two bytes, read to one beyond."""
    return -(-(2 * densest + 16) // 16) * 16


def shared_memory(warps: int, rows: int, densest: int) -> int:
    return _TABLE + warps * _STAGES * rows * stride_of(densest) + _BEYOND
