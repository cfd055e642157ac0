"""y = x S^T + (x A^T) B^T + bias for up to 16 rows of x, read from the packed S (Triton).

At such sizes the time is that of reading S. A program owns some output rows and walks along them; a thread owns a
few columns of each (see `support`) and takes its values through the cache, where its neighbours' values already are.
u = x A^T is a small kernel of its own; B u and the bias join the sum before y is written, once. Layers with the same x
share a launch.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch_config import Plan
from ..support_index import SupportIndex, index_of
from .gemv import multiply_vector
from .small_batch import add_parts, multiply_tiles
from .support import pick


class Packed(NamedTuple):
    """A packed layer: mask and index, values (nonzeros,), A (rank, in), B (out, rank) or None, bias (out,) or None."""

    mask: torch.Tensor
    index: SupportIndex
    values: torch.Tensor
    A: torch.Tensor | None
    B: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def of(cls, mask, values, A, B, bias, in_features: int) -> "Packed":
        """The layer of these tensors, with its index, which is made once."""
        rest = (tensor if tensor is None else tensor.contiguous() for tensor in (values, A, B, bias))
        return cls(mask, index_of(mask, in_features), *rest)

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @property
    def kind(self) -> tuple:
        """What layers that share a launch have in common."""
        index = self.index
        exact = index.per_block, can_pair(index, self.values), _aligned(self.values)
        return (*exact, index.in_features, self.values.dtype, self.A is None, self.bias is None)


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


def decode(inputs: torch.Tensor, layers: Sequence[Packed], plan: Plan) -> list[torch.Tensor]:
    """x S^T + (x A^T) B^T + bias of every layer, summed in FP32.

    Args:
        inputs: x (rows, in), 1 to 16 rows; of 16 bits, but for "vector".
        layers: of one `kind`, in the dtype and on the device of the inputs.

    Returns:
        (rows, out) for each layer, the dtype of the inputs.
    """
    count, ins = inputs.shape
    inputs, one = inputs.contiguous(), layers[0]
    low_rank = one.A is not None
    dependent = low_rank and _can_overlap(inputs.device)
    us = _low_rank(inputs, layers, dependent) if low_rank else [inputs] * len(layers)
    ys = [inputs.new_empty((count, layer.index.shape[0])) for layer in layers]
    tile = plan.warps * (64 if plan.form == "tiles" else 256)  # columns of a program at a time
    span, split = spread(ins, tile, plan.split)
    parts = ys if split == 1 else [y.new_empty((split, *y.shape), dtype=torch.float32) for y in ys]
    arguments = tuple(map(_arguments, layers, us, ys, parts))
    ends = tuple(accumulate(ceil_div(y.shape[1], plan.rows) for y in ys))
    sizes = inputs, arguments, ends, ins, one.index.shape[1]
    constants = {
        "ROWS": plan.rows, "PER_BLOCK": one.index.per_block, "PAIRS": can_pair(one.index, one.values),
        "EVEN": ins % tile == 0, "LOW_RANK": low_rank, "BIAS": one.bias is not None, "DEPENDENT": dependent,
        "num_warps": plan.warps, "num_stages": 1,
    }  # fmt: skip
    if dependent:
        constants["launch_pdl"] = True
    if plan.form == "vector":
        wide = ins % 8 == 0 and _aligned(inputs)
        multiply_vector[ends[-1], count](*sizes, LANES=32 * plan.warps, WIDE=wide, **constants)
        return ys
    constants |= {"WARPS": plan.warps, "AHEAD": plan.ahead, "ALIGNED": _aligned(one.values)}
    multiply_tiles[ends[-1], split](*sizes, count, span, BATCH=8 if count <= 8 else 16, **constants)
    if split > 1:
        for y, part in zip(ys, parts, strict=True):
            add_up(part, y)
    return ys


def _arguments(layer: Packed, u: torch.Tensor, y: torch.Tensor, part: torch.Tensor) -> tuple:
    """What the kernels take for a layer; `y` stands in for what it does not have."""
    mask, index, values, _, B, bias = layer
    support = index.words(mask), values, index.starts, index.offsets, index.nonzeros
    rest = y if B is None else B, u, y if bias is None else bias, part
    return *support, *rest, y.shape[1], layer.rank


def ceil_div(number: int, size: int) -> int:
    """Parts of a size that hold so many; `triton.cdiv` takes microseconds."""
    return -(-number // size)


def spread(ins: int, step: int, split: int) -> tuple[int, int]:
    """(span, split): whole steps of columns for each program, and how many programs they are for, `split` at most."""
    span = ceil_div(ceil_div(ins, step), split) * step
    return span, ceil_div(ins, span)


def add_up(parts: torch.Tensor, y: torch.Tensor) -> None:
    """y = the sum of the parts (split, *y.shape), FP32."""
    add_parts[(ceil_div(y.numel(), 512),)](parts, y, y.numel(), SPLIT=parts.shape[0], WIDTH=512)


def can_pair(index: SupportIndex, values: torch.Tensor) -> bool:
    """Whether four values can be read as one word at a known place."""
    return index.pairs and _aligned(values)


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether entries of 16 bits can be read four at a time."""
    return tensor.element_size() == 2 and tensor.data_ptr() % 8 == 0


def _low_rank(inputs: torch.Tensor, layers: Sequence[Packed], dependent: bool) -> list[torch.Tensor]:
    """x A^T (rows, rank) of every layer, FP32."""
    count, ins = inputs.shape
    ranks = [layer.rank for layer in layers]
    us = [inputs.new_empty((count, rank), dtype=torch.float32) for rank in ranks]
    arguments = tuple((layer.A, u, rank) for layer, u, rank in zip(layers, us, ranks, strict=True))
    ends, width = tuple(accumulate(ranks)), min(4096, 1 << (ins - 1).bit_length())
    _project[ends[-1], count](inputs, arguments, ends, ins, WIDTH=width, DEPENDENT=dependent, num_warps=8)
    return us


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one it follows has ended (programmatic dependent launch)."""
    if device.type != "cuda" or not torch.version.cuda:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9
