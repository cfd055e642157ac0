"""u = x A^T on the tensor cores, by `low_rank.cu` or, on compute capability 9.0, `wgmma.cu`: cuBLAS takes the host five
times as long, and does not run beside the product with S."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..launch import DriverLaunch, TritonLaunch, Varying, drives
from ..launch_config import MOST_ROWS, bucket
from ..packed_weight import PackedWeight
from ..program import ROWS, Joint, Launch, Memory, Multiply, Part, PerRows, Program, Step, X, with_joined, y
from ..triton.decode import ceil_div, sum_of_parts
from .nvrtc import CompileError, load_function
from .tensor_map import tensor_map

_MOST_WEIGHTS = 4  # of a launch, as in the source
_MOST_ROWS = 4096  # of x; with more, cuBLAS is faster than the host
_MOST_SCRATCH = 2**22  # entries of 4 bytes that are taken from a stream's scratch memory
_JOINT_ROWS = 256  # of x, up to which weights that share it share a launch of `low_rank.cu`


class WideShape(NamedTuple):
    """Of a block of `wgmma.cu` that computes x A^T, 64 factors.

    Attributes:
        batch: rows of x of it.
        split: blocks that share the columns.
        stages: under way.
    """

    batch: int
    split: int
    stages: int


def factor_step(rows: int, weight: PackedWeight, u: int, wide: WideShape | None = None) -> Step:
    """u (rows, rank) = x A^T, rounded to the dtype of the values; for up to `rows` rows of x, raised to a power of two.

    Args:
        u: its slot.
        wide: by `wgmma.cu`, where A can be read by it; up to `_JOINT_ROWS` rows only for a weight alone.
    """
    A, rank, ins = weight.A, weight.rank, weight.in_features
    fits = A.is_cuda and A.element_size() == 2 and ins % 8 == 0 and A.data_ptr() % 16 == 0 and drives()
    kernel = _kernel(A.get_device(), A.dtype, bucket(rows)) if fits and rows <= _MOST_ROWS else None
    if wide and fits:
        kernel = kernel if rows <= _JOINT_ROWS else None
        return _Wide(A.get_device(), A.dtype, wide, kernel).launch([(A.data_ptr(), rank, u)], ins)
    if kernel is None:
        return Multiply(u, X, Part(0, "A"), rank, ins)
    return kernel.launch([(A.data_ptr(), rank, u)], ins)


class _Shape(NamedTuple):
    """Of a block.

    Attributes:
        warps: of it.
        tiles: of eight rows of x.
        groups: of 16 factors.
        cluster: blocks that share the columns.
    """

    warps: int
    tiles: int
    groups: int
    cluster: int


# Up to so many rows of x; blocks enough to keep a GPU busy. Of compute capability 9.0, and before.
_SHAPES = {
    64: (_Shape(8, 1, 1, 8), _Shape(16, 1, 1, 1)),
    128: (_Shape(8, 2, 1, 8), _Shape(16, 2, 1, 1)),
    256: (_Shape(8, 4, 1, 8), _Shape(8, 4, 1, 1)),
    512: (_Shape(8, 4, 2, 4), _Shape(8, 4, 1, 1)),
    1024: (_Shape(8, 4, 4, 4), _Shape(8, 4, 2, 1)),
    2048: (_Shape(8, 4, 4, 2), _Shape(8, 4, 4, 1)),
    _MOST_ROWS: (_Shape(8, 4, 4, 1), _Shape(8, 4, 4, 1)),
}


@dataclass(frozen=True)
class _Kernel:
    """`low_rank.cu` for a shape: its handle."""

    function: int
    shape: _Shape

    def launch(self, products: Sequence[tuple[int, int, int]], ins: int) -> "_Factors":
        """The launch for addresses of A, ranks and slots of u, at most `_MOST_WEIGHTS` of each."""
        warps, tiles, groups, cluster = self.shape
        ends = list(accumulate(ceil_div(rank, 16 * groups) for _, rank, _ in products))
        arguments: list[Any] = [Varying(0, None), Varying(1, None), ins]
        for number, ((A, rank, _), end) in enumerate(zip(products, ends, strict=True)):
            arguments += [A, Varying(2 + number, None), rank, end]
        arguments += [0, 0, 0, ends[-1]] * (_MOST_WEIGHTS - len(products))
        launch = DriverLaunch(self.function, (1, 1, 1), (32 * warps,), 0, arguments)
        slots = X, ROWS, *(slot for _, _, slot in products)
        matrices = tuple((A, rank) for A, rank, _ in products)
        grid = ends[-1], PerRows(1, 8 * tiles), cluster
        return _Factors(launch, slots, grid, kernel=self, matrices=matrices, ins=ins)


@dataclass(frozen=True, kw_only=True)
class _Factors(Joint):
    """A launch for some A (rank, ins): their addresses and ranks, and the kernel that may take several."""

    kernel: "_Kernel | _Wide"
    matrices: tuple[tuple[int, int], ...]
    ins: int

    @property
    def results(self) -> tuple[int, ...]:
        """The slots of u."""
        return tuple(slot for slot in self.slots if slot not in (ROWS, X))

    def joined(self, launches: Sequence["_Factors"]) -> list["_Factors"]:
        """See `Joint`."""
        if len(launches) == 1:
            return list(launches)
        products = [(*matrix, slot) for one in launches for matrix, slot in zip(one.matrices, one.results, strict=True)]
        few = [products[i : i + _MOST_WEIGHTS] for i in range(0, len(products), _MOST_WEIGHTS)]
        return [self.kernel.launch(some, self.ins) for some in few]


# Up to so many rows of x; `_LONG` where it leaves the product after it as many turns as it has alone: then a few
# multiprocessors compute x A^T, and the others begin with the product.
_WIDE = (
    (64, WideShape(32, 8, 4)),
    (128, WideShape(64, 8, 3)),
    (256, WideShape(128, 8, 2)),
    (512, WideShape(128, 1, 8)),
    (4096, WideShape(64, 8, 3)),
    (None, WideShape(128, 2, 8)),
)
_LONG, _LONG_ROWS = WideShape(256, 1, 5), (513, 4096)


def wide_shape(rows: int, ranks: Sequence[int], blocks: int, multiprocessors: int) -> WideShape:
    """For x A^T of some weights, before a product of so many blocks of which a multiprocessor has one at a time."""
    fewest, most = _LONG_ROWS
    long = sum(ceil_div(rank, 64) for rank in ranks) * ceil_div(rows, _LONG.batch)
    if fewest <= rows <= most and ceil_div(blocks + long, multiprocessors) == ceil_div(blocks, multiprocessors):
        return _LONG
    return next(shape for most, shape in _WIDE if most is None or rows <= most)


@dataclass(frozen=True)
class _Wide:
    """`wgmma.cu` for a shape.

    Attributes:
        together: what computes x A^T of several weights; None: the same.
    """

    device: int
    dtype: torch.dtype
    shape: WideShape
    together: _Kernel | None

    def launch(self, products: Sequence[tuple[int, int, int]], ins: int) -> _Factors:
        """The launch for addresses of A, ranks and slots of u, at most `_MOST_WEIGHTS` of each."""
        batch, split, stages = self.shape
        steps = ceil_div(ins, 64)
        split = min(split, steps)
        shared = stages * (128 * (64 + batch) + 16) + 1024
        defines = [f"WEIGHTS={len(products)}", "WHOLE", "RANK", "WGS=1", f"N={batch}", "COLUMNS=128"]
        defines += [f"STAGES={stages}", "CLUSTER=1", f"PARTS={split}", "RESIDENT=1"]
        defines += ["HALF"] * (self.dtype == torch.float16)
        function = load_function("wgmma.cu", "wgmma", tuple(defines), self.device, shared)
        ends = list(accumulate(ceil_div(rank, 64) for _, rank, _ in products))
        arguments = tensor_map(products[0][0], products[0][1], ins, (64, 64))  # not read
        for number, ((A, rank, _), end) in enumerate(zip(products, ends, strict=True)):
            left = tensor_map(A, rank, ins, (64, 64))
            x = [Varying(2 * number, None), *tensor_map(A, None, ins, (batch // 2, 64))[1:]]
            arguments += [*left, *left, *x, A, A, Varying(2 * number + 1, None), rank, ins, end, 0, 0]
        arguments += [Varying(2 * len(products), None), 0, ceil_div(steps, split), *[0] * 5]
        launch = DriverLaunch(function, (1, 1, 1), (160,), shared, arguments)
        batches = PerRows(1, batch)
        grid = (ends[-1], batches, 1) if split == 1 else (ends[-1], split, batches)
        slots = *itertools.chain.from_iterable((X, slot) for _, _, slot in products), ROWS
        matrices = tuple((A, rank) for A, rank, _ in products)
        return _Factors(launch, slots, grid, kernel=self.together or self, matrices=matrices, ins=ins)


def with_factors_and_parts(
    rows: int,
    weights: Sequence[PackedWeight],
    launch: DriverLaunch | TritonLaunch,
    grid: tuple,
    split: int = 1,
    wide: WideShape | None = None,
) -> Program:
    """The product by a launch of (x, u of each weight, y of each, ROWS), which reads u = x A^T where there are low-rank
    parts.

    Args:
        weights: of one dtype, all with a low-rank part or none.
        split: parts of the columns of one weight, whose results it writes to FP32 memory in the place of y; they are
            summed after it.
        wide: see `factor_step`.
    """
    outs, like = tuple(weight.out_features for weight in weights), weights[0].values
    memories: list[Memory] = []
    steps: list[Step] = []
    factors, targets, place = [X] * len(outs), list(map(y, range(len(outs)))), 2 + len(outs)
    if weights[0].rank:
        factors = list(range(place, place + len(outs)))
        steps = [factor_step(rows, weight, slot, wide) for weight, slot in zip(weights, factors, strict=True)]
        by_address = all(isinstance(step, Launch) for step in steps)
        memories = [factor_memory(rows, like.dtype, weight.rank, by_address) for weight in weights]
    if split > 1:
        targets = [place + len(memories)]
        memories.append(factor_memory(rows, torch.float32, split * outs[0], True))
    steps = [*with_joined(steps), Launch(launch, (X, *factors, *targets, ROWS), grid)]
    if split > 1:
        steps.append(sum_of_parts(split, like, outs[0], targets[0], y(0)))
    return Program(outs, tuple(memories), tuple(steps))


def factor_memory(rows: int, dtype: torch.dtype, per_row: int, by_address: bool) -> Memory:
    """Entries for each row of x, for up to `rows` rows, raised to a power of two: the stream's, which costs a call no
    allocation, where that is no waste and its users take an address."""
    size = ceil_div(bucket(rows) * per_row * dtype.itemsize, 16) * 4  # all start at addresses for wide loads
    if by_address and bucket(rows) < MOST_ROWS and size <= _MOST_SCRATCH:
        return Memory(torch.float32, size, shared=True)
    return Memory(dtype, per_row=per_row)


@functools.cache
def _kernel(device: int, dtype: torch.dtype, rows: int) -> _Kernel | None:
    """For up to so many rows. None where NVRTC is missing, which `small_batch` has said."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None
    newer, older = next(shapes for most, shapes in _SHAPES.items() if rows <= most)
    shape = newer if capability >= (9, 0) else older
    defines = [f"{name.upper()}={value}" for name, value in shape._asdict().items()]
    defines += ["HALF"] * (dtype == torch.float16)
    try:
        return _Kernel(load_function("low_rank.cu", "low_rank", tuple(defines), device, 0), shape)
    except (CompileError, OSError):
        return None
