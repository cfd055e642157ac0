"""y = x S^T + (x A^T) B^T + bias for up to 16 rows of x, read from the packed S (Triton).

At such sizes the time is that of reading S. A program owns some output rows and walks along them; a thread owns a
few columns of each (see `support`) and takes its values through the cache, where its neighbours' values already are.
u = x A^T is a small kernel of its own; B u and the bias join the sum before y is written, once. Layers with the same x
share a launch.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from ..launch import COUNTERS, TritonLaunch, Varying, scratch
from ..launch_config import LaunchConfig
from ..packed_weight import PackedWeight
from ..program import ROWS, Launch, Memory, PerRows, Program, X, y
from ..support_index import SupportIndex, index_of
from .gemv import multiply_vector
from .small_batch import add_parts, multiply_tiles
from .support import pick


def kind_of(weight: PackedWeight) -> tuple:
    """The properties that weights must share to share a launch."""
    index = index_of(weight.mask, weight.in_features)
    exact = index.per_block, can_pair(index, weight.values), _aligned(weight.values)
    return (*exact, index.in_features, weight.values.dtype, weight.A is None, weight.bias is None)


@triton.jit
def _project(x, factors, ends, ins, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr):
    """u = x A^T, one entry a program."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    chosen, row = pick(factors, ends, tl.program_id(0))
    A, u, rank = chosen
    sample = tl.program_id(1)
    total = tl.zeros((WIDTH,), tl.float32)
    for k in range(0, ins, WIDTH):
        column = k + tl.arange(0, WIDTH)
        inside = column < ins
        left = tl.load(x + sample * ins + column, mask=inside, other=0).to(tl.float32)
        total += left * tl.load(A + row * ins + column, mask=inside, other=0).to(tl.float32)
    tl.store(u + sample * rank + row, tl.sum(total, 0))


def bind_decode(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Program:
    """x S^T + (x A^T) B^T + bias of every weight, summed in FP32, by "gemv" or "small_batch".

    Args:
        rows: of x, 1 to 16.
        weights: of one kind (`kind_of`); of 16 bits, but for "gemv".
    """
    one, ins = weights[0], weights[0].in_features
    index = index_of(one.mask, ins)
    low_rank = one.A is not None
    dependent = low_rank and can_overlap(one.values.device)
    tile = config.warps * (64 if config.kernel == "small_batch" else 256)  # columns of a program at a time
    span, split = spread(ins, tile, config.split)
    outs = tuple(weight.out_features for weight in weights)
    x = Varying(0, one.values.new_empty((rows, ins)))
    us = [Varying(1 + n, x.example.new_empty((1,), dtype=torch.float32)) for n in range(len(weights))]
    kept = torch.float32 if split > 1 else one.values.dtype
    targets = [Varying(1 + len(us) + n, x.example.new_empty((1,), dtype=kept)) for n in range(len(weights))]
    arguments = tuple(map(_arguments, weights, us, targets))
    ends = tuple(accumulate(ceil_div(out, config.rows) for out in outs))
    given = x, arguments, ends, ins, index.shape[1]
    constants = {
        "ROWS": config.rows, "PER_BLOCK": index.per_block, "PAIRS": can_pair(index, one.values),
        "EVEN": ins % tile == 0, "LOW_RANK": low_rank, "BIAS": one.bias is not None, "DEPENDENT": dependent,
        "num_warps": config.warps, "num_stages": 1,
    }  # fmt: skip
    if dependent:
        constants["launch_pdl"] = True
    if config.kernel == "gemv":
        constants |= {"LANES": 32 * config.warps, "WIDE": ins % 8 == 0 and one.values.element_size() == 2}
        main = TritonLaunch(multiply_vector, (ends[-1], rows), given, constants)
    else:
        constants |= {"WARPS": config.warps, "AHEAD": config.ahead, "ALIGNED": _aligned(one.values)}
        constants["BATCH"] = 8 if rows <= 8 else 16
        main = TritonLaunch(multiply_tiles, (ends[-1], split), (*given, rows, span), constants)
    results, place = tuple(map(y, range(len(outs)))), 2 + len(outs)
    memories, steps, factors, parts = [], [], (X,) * len(outs), results
    if low_rank:
        sizes = (ceil_div(rows * weight.rank, 4) * 4 for weight in weights)  # all start at addresses for wide loads
        memories += [Memory(torch.float32, size, shared=True) for size in sizes]
        factors = tuple(range(place, place + len(outs)))
        steps.append(Launch(_bind_low_rank(rows, weights, x, us, dependent), (X, *factors)))
    if split > 1:
        parts = tuple(place + len(memories) + n for n in range(len(outs)))
        memories += [Memory(torch.float32, split * rows * out) for out in outs]
    steps.append(Launch(main, (X, *factors, *parts)))
    if split > 1:
        steps += map(functools.partial(sum_of_parts, split, one.values), outs, parts, results)
    return Program(outs, tuple(memories), tuple(steps))


def space(inputs: torch.Tensor, sizes: list[int], launch: TritonLaunch) -> list:
    """FP32 memory for a launch, one buffer a size: addresses if the launch takes them, because tensors cost time."""
    if launch.takes_addresses:
        start = scratch(inputs.get_device(), COUNTERS + 4 * sum(sizes))
        if start is not None:
            return [start + COUNTERS + 4 * place for place in accumulate(sizes[:-1], initial=0)]
    return list(torch.empty(sum(sizes), dtype=torch.float32, device=inputs.device).split(sizes))


def _arguments(weight: PackedWeight, u: Varying, target: Varying) -> tuple:
    """The kernels' arguments for a weight; the values stand in for missing tensors."""
    index = index_of(weight.mask, weight.in_features)
    support = index.words(weight.mask), weight.values, index.starts, index.offsets, index.nonzeros
    B = weight.values if weight.B is None else weight.B
    bias = weight.values if weight.bias is None else weight.bias
    return *support, B, u, bias, target, weight.out_features, weight.rank


def ceil_div(number: int, size: int) -> int:
    """Parts of a size that hold so many; `triton.cdiv` takes microseconds."""
    return -(-number // size)


def spread(ins: int, step: int, split: int) -> tuple[int, int]:
    """(span, split): whole steps of columns for each program, and how many programs they are for, `split` at most."""
    span = ceil_div(ceil_div(ins, step), split) * step
    return span, ceil_div(ins, span)


def sum_of_parts(split: int, like: torch.Tensor, out: int, parts: int, result: int) -> Launch:
    """y (rows, out), of the dtype of `like`, = the sum of its parts (split, rows, out), FP32; both by their slots."""
    source = Varying(0, like.new_empty((1,), dtype=torch.float32))
    arguments = source, Varying(1, like.new_empty((1,))), Varying(2, 1), out
    launch = TritonLaunch(add_parts, (1,), arguments, {"SPLIT": split, "WIDTH": 512})
    return Launch(launch, (parts, result, ROWS), (PerRows(out, 512), 1, 1))


def can_pair(index: SupportIndex, values: torch.Tensor) -> bool:
    """Whether four values can be read as one word at a known place."""
    return index.pairs and _aligned(values)


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether entries of 16 bits can be read four at a time."""
    return tensor.element_size() == 2 and tensor.data_ptr() % 8 == 0


def _bind_low_rank(
    rows: int, weights: Sequence[PackedWeight], x: Varying, us: list[Varying], dependent: bool
) -> TritonLaunch:
    """x -> x A^T (rows, rank) of every weight, FP32."""
    ins, ranks = weights[0].in_features, [weight.rank for weight in weights]
    arguments = tuple((weight.A, u, weight.rank) for weight, u in zip(weights, us, strict=True))
    ends, width = tuple(accumulate(ranks)), min(4096, 1 << (ins - 1).bit_length())
    constants = {"WIDTH": width, "DEPENDENT": dependent, "num_warps": 8}
    return TritonLaunch(_project, (ends[-1], rows), (x, arguments, ends, ins), constants)


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one it follows has ended (programmatic dependent launch)."""
    if device.type != "cuda" or not torch.version.cuda:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9
