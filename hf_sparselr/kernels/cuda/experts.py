"""The products of experts with their rows of x on the tensor cores, by `experts.cu`: one launch for all experts."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..gpu import ready
from ..launch import COUNTERS, DriverLaunch, Varying, scratch
from ..packed_weight import PackedWeight
from ..support_index import SupportIndex, index_of
from ..triton.decode import ceil_div
from ..triton.experts import Unpacking
from . import small_batch
from .nvrtc import load_function
from .small_batch import in_fours, stride_of

# x (rows, in) in the order of the experts, and for each expert the first row after its own, int32, to (rows, out).
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_SOURCE = "small_batch.cu+experts.cu"
_KEPT, _TAKEN = 80, 144  # as in the source


@dataclass(frozen=True)
class Config:
    """How to launch the products.

    Attributes:
        rows, warps, resident, ahead: as of "mma" in `launch_config.LaunchConfig`.
        tiles: of eight rows of x that a block takes at a time.
        samples: rows of x of a block that takes many, or 0.
        deep: with `samples`, stages of loads in shared memory.
        unpack: S of all experts is written first, for torch's grouped product.
        parts, across: with `samples`, tiles of 16 rows of S of a warp, and warps beside each other along the rows of x.
    """

    rows: int = 16
    warps: int = 8
    resident: int = 3
    ahead: int = 4
    tiles: int = 1
    samples: int = 0
    parts: int = 0
    across: int = 1
    deep: int = 4
    unpack: bool = False


PAIRS_32 = Config(resident=2, ahead=1, samples=32, parts=2, deep=3)
PAIRS_64 = Config(resident=2, ahead=1, samples=64, parts=2, deep=3)
PAIRS_128 = Config(resident=1, ahead=1, samples=128, parts=2)


class ExpertTable:
    """What the kernels know of the weights of a stack's experts. Holds none of their memory.

    Args:
        weights: that `supports` takes.
    """

    def __init__(self, weights: Sequence[PackedWeight]) -> None:
        one = weights[0]
        indices = [index_of(weight.mask, weight.in_features) for weight in weights]
        self.experts, self.outs, self.ins = len(weights), one.out_features, one.in_features
        self.pairs, self.per_block = indices[0].pairs, indices[0].per_block
        self.blocks, self.densest = indices[0].shape[1], max(index.densest for index in indices)
        self.ranks = [weight.rank for weight in weights]
        self.in_fours = all(map(in_fours, weights))
        self.low_rank, self.bias = one.A is not None, one.bias is not None
        self.dtype, self.device = one.values.dtype, one.values.device
        whole = all(weight.A is None or (weight.rank % 4 == 0 and weight.B.data_ptr() % 8 == 0) for weight in weights)
        self.takes_many = self.pairs and whole and self.dtype == torch.bfloat16
        self._bound: dict[tuple[Config, bool], Product] = {}
        self.entries = table_entries(weights, indices)
        self._tables = [tensor for index in indices for tensor in (index.padded, index.starts, index.offsets)]

    def room(self, rows: int) -> int:
        """Columns beside those of x that the product of so many rows has a use for."""
        return self.unpacking.extra if self._config(rows).unpack else 0

    def grouped(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The products of rows in the order of their experts.

        Args:
            x: (rows, in), or (rows, in + room) with anything in the columns at the end, which are written to.
            ends: int32 (experts,), the first row after each expert's.
        """
        config = self._config(len(x))
        return self.bind(config, len(x) < self.experts)(x, ends)

    def _config(self, rows: int) -> Config:
        unpacks = not self.bias and self.dtype == torch.bfloat16  # torch's product waits for the device in FP16
        return best_config(rows, self.experts, self.ins, self.takes_many, unpacks)

    def compile(self) -> None:
        """The kernel for one row of x.

        Raises:
            CompileError: NVRTC refuses the source.
        """
        self.bind(self._config(1), by_row=self.experts > 1)

    def takes(self, rows: int) -> bool:
        """Whether there is a fast way for so many rows of x."""
        return self.dtype == torch.bfloat16 or rows <= 48 * self.experts

    @functools.cached_property
    def unpacking(self) -> Unpacking:
        sizes = self.experts, self.outs, self.ins, self.blocks
        return Unpacking(self.entries, sizes, max(self.ranks), self.pairs, self.per_block, self.dtype)

    def bind(self, config: Config, by_row: bool = False) -> Product:
        """The launch of a configuration; it takes any number of rows, and any number for each expert.

        Args:
            by_row: a block for each row, instead of one for each expert: for few rows.
        """
        by_row = by_row and not (config.samples or config.unpack)
        product = self._bound.get((config, by_row))
        if product is None:
            product = self._unpacked if config.unpack else self._bind(config, by_row)
            self._bound[config, by_row] = product
        return product

    def _unpacked(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """By torch's grouped product of [x, u] and [S, B]."""
        unpacking, ins = self.unpacking, self.ins
        weights = unpacking.weights(ends)
        if unpacking.extra:
            if x.shape[1] == ins:
                x = F.pad(x, (0, unpacking.extra))
            x[:, ins:] = F.grouped_mm(x[:, :ins], unpacking.factors(ends).transpose(1, 2), offs=ends)
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)

    def _bind(self, config: Config, by_row: bool) -> Product:
        if config.samples:
            return self._bind_pairs(config)
        small = 32 * config.warps * config.tiles * config.rows
        shared = small
        if not self.pairs:
            shared = max(small, small_batch.shared_memory(config.warps, config.rows, self.densest))
        load, block = self._loader(config, ["BY_ROW"] * by_row), (32 * config.warps,)
        widest, experts, outs = max(self.ranks), self.experts, self.outs
        arguments = self._arguments(widest)
        overlaps = self.low_rank and torch.cuda.get_device_capability(self.device) >= (9, 0)
        main = DriverLaunch(load("experts", shared=shared), (1,), block, shared, arguments, overlaps)
        first = None
        if self.low_rank:
            first = DriverLaunch(load("experts_low_rank", shared=small), (1,), block, small, arguments)
        bands, factors = ceil_div(outs, config.rows), ceil_div(widest, config.rows)
        device = self.device.index

        def product(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            x, rows = ready(x), len(x)
            y = x.new_empty(rows, outs)
            u: int | torch.Tensor = 0
            units = rows if by_row else experts
            if first is not None:
                start = scratch(device, COUNTERS + 4 * rows * widest)
                u = x.new_empty(rows * widest, dtype=torch.float32) if start is None else start + COUNTERS
                first(x, u, y, ends, grid=(factors, units, 1))
            main(x, u, y, ends, grid=(bands, units, 1))
            return y

        return product

    def _bind_pairs(self, config: Config) -> Product:
        height = 16 * config.parts * config.warps // config.across
        shared = config.deep * (height * _KEPT + config.samples * _TAKEN)
        shared = max(shared, 2 * config.samples * (height + 8))  # y takes the place of the stages
        unpacking = self.unpacking
        function = self._loader(config, [])("experts_pairs", shared=shared)
        launch = DriverLaunch(function, (1,), (32 * config.warps,), shared, self._arguments(unpacking.extra))
        bands, experts, outs = ceil_div(self.outs, height), self.experts, self.outs

        def product(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            x, rows = ready(x), len(x)
            y = x.new_empty(rows, outs)
            u = F.grouped_mm(x, unpacking.factors(ends).transpose(1, 2), offs=ends) if unpacking.extra else y
            launch(x, u, y, ends, grid=(experts + rows // config.samples, bands, 1))
            return y

        return product

    def _loader(self, config: Config, defines: list[str]) -> Callable[..., int]:
        """Loads a kernel of the source by its name."""
        defines += [f"ROWS={config.rows}", f"WARPS={config.warps}", f"RESIDENT={config.resident}", "WEIGHTS=1"]
        defines += [f"AHEAD={config.ahead}", f"TILES={config.tiles}"]
        defines += ["PAIRS"] if self.pairs else [f"STRIDE={stride_of(self.densest)}"]
        if self.per_block and not self.pairs:
            defines.append(f"PER_BLOCK={self.per_block}")
        defines += ["HALF"] * (self.dtype == torch.float16) + ["BIAS"] * self.bias
        defines += ["RANK"] * self.low_rank + ["FOURS"] * self.in_fours
        if config.samples:
            defines += ["MANY", f"SAMPLES={config.samples}", f"PARTS={config.parts}", f"ACROSS={config.across}"]
            defines.append(f"DEEP={config.deep}")
        return functools.partial(load_function, _SOURCE, defines=tuple(defines), device=self.device.index)

    def _arguments(self, widest: int) -> list:
        """Of the kernels. Varying: x, u, y, the ends of the experts' rows."""
        given = [Varying(0, None), Varying(1, None), Varying(2, None), self.entries, Varying(3, None)]
        return [*given, self.experts, self.ins, self.blocks, widest]


def table_entries(weights: Sequence[PackedWeight], indices: Sequence[SupportIndex]) -> torch.Tensor:
    """The structs `Weight` of the source: int64 (experts, 13), on the device of the weights, without their memory."""
    entries = []
    for weight, index in zip(weights, indices, strict=True):
        tensors = index.words(weight.mask), weight.values, index.starts, index.offsets, weight.B, weight.bias, None
        first = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        A = 0 if weight.A is None else weight.A.data_ptr()
        entries.append([*first, weight.out_features, weight.rank, 0, index.nonzeros, 0, A])
    return torch.tensor(entries, dtype=torch.int64).to(weights[0].values.device)


def best_config(rows: int, experts: int, ins: int, takes_many: bool, unpacks: bool) -> Config:
    """The configuration for so many rows of x, as measured on an H100 (see the room's notes).

    Args:
        takes_many: whether "experts_pairs" takes the weights.
        unpacks: whether S may be unpacked for torch's grouped product.
    """
    mean = rows / experts
    if unpacks and mean > (256 if takes_many else 24):
        return Config(unpack=True)
    if takes_many and mean > 24:
        return PAIRS_64 if mean <= 48 else PAIRS_128
    narrow = ins <= 1024 or (ins <= 2048 and rows >= experts)
    if mean > 12:
        if takes_many and narrow:
            return PAIRS_32
        return Config(tiles=4, ahead=1, resident=2) if ins > 8192 else Config(tiles=4, warps=4, ahead=1, resident=4)
    tiles = 1 if mean <= 4 else 2
    return Config(tiles=tiles, warps=4, ahead=1, resident=6) if narrow else Config(tiles=tiles)


def supports(weights: Sequence[PackedWeight]) -> bool:
    """Whether there are such kernels for the weights of a stack: alike in all but their ranks and values."""
    kinds = set()
    for weight in weights:
        index = index_of(weight.mask, weight.in_features)
        kind = index.pairs, index.per_block, weight.A is None, weight.bias is None
        kinds.add((*kind, weight.out_features, weight.in_features, weight.values.dtype, weight.values.device))
    natively = (small_batch.supports(weight, index_of(weight.mask, weight.in_features)) for weight in weights)
    return len(kinds) == 1 and weights[0].out_features > 0 and all(natively)
