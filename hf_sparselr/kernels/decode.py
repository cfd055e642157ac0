"""y = x S^T + (x A^T) B^T + bias for up to 16 rows of x, read from the packed S (Triton).

At such sizes the time is that of reading S. A program owns some output rows and walks along them; a thread owns a
few columns of each (see `support`) and takes its values through the cache, where its neighbours' values already are.
u = x A^T is a small kernel of its own; B u and the bias join the sum before y is written, once.
"""

import functools

import torch
import triton
import triton.language as tl

from .index import SupportIndex
from .plan import Plan
from .tiles import add_parts, multiply_tiles
from .vector import multiply_vector


@triton.jit
def _project(x, A, u, ins, rank, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr):
    """u = x A^T, one entry a program."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    row, sample = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((WIDTH,), tl.float32)
    for k in range(0, ins, WIDTH):
        column = k + tl.arange(0, WIDTH)
        inside = column < ins
        left = tl.load(x + sample * ins + column, mask=inside, other=0).to(tl.float32)
        total += left * tl.load(A + row * ins + column, mask=inside, other=0).to(tl.float32)
    tl.store(u + sample * rank + row, tl.sum(total, 0))


def decode(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    index: SupportIndex,
    values: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: Plan,
) -> torch.Tensor:
    """x S^T + (x A^T) B^T + bias, summed in FP32.

    Args:
        inputs: x (rows, in), 1 to 16 rows; of 16 bits, but for "vector".
        mask: the packed mask, `index` its index.
        values: (nonzeros,), A (rank, in), B (out, rank) and bias (out,): the dtype and device of the inputs.

    Returns:
        (rows, out), the dtype of the inputs.
    """
    count, ins = inputs.shape
    outs, blocks = index.shape
    inputs, values = inputs.contiguous(), values.contiguous()
    rank = 0 if A is None else A.shape[0]
    dependent = rank > 0 and _can_overlap(inputs.device)
    y = inputs.new_empty((count, outs))
    u = _low_rank(inputs, A.contiguous(), dependent) if rank else y
    pairs = can_pair(index, values)
    columns = 8 if pairs else plan.columns
    tile = plan.warps * (64 if plan.form == "tiles" else 32 * columns)
    tensors = (
        inputs, index.words(mask), values, index.starts, index.offsets, u, B.contiguous() if rank else y,
        y if bias is None else bias.contiguous(),
    )  # fmt: skip
    constants = {
        "ROWS": plan.rows, "COLUMNS": columns, "PER_BLOCK": index.per_block, "PAIRS": pairs, "EVEN": ins % tile == 0,
        "LOW_RANK": rank > 0, "BIAS": bias is not None, "DEPENDENT": dependent, "num_warps": plan.warps,
        "num_stages": 1,
    }  # fmt: skip
    if dependent:
        constants["launch_pdl"] = True
    programs, sizes = -(-outs // plan.rows), (outs, ins, blocks, rank)
    if plan.form == "vector":
        multiply_vector[programs, count](*tensors, y, *sizes, LANES=32 * plan.warps, **constants)
        return y
    tiles = -(-ins // tile)
    span = -(-tiles // plan.split) * tile
    split = -(-ins // span)
    target = y if split == 1 else torch.empty((split, count, outs), dtype=torch.float32, device=y.device)
    multiply_tiles[programs, split](
        *tensors, target, *sizes, count, span,
        BATCH=8 if count <= 8 else 16, WARPS=plan.warps, AHEAD=plan.ahead, **constants,
    )  # fmt: skip
    if split > 1:
        add_parts[(-(-y.numel() // 512),)](target, y, y.numel(), SPLIT=split, WIDTH=512)
    return y


def can_pair(index: SupportIndex, values: torch.Tensor) -> bool:
    """Whether four values can be read as one word at a known place."""
    return index.pairs and values.element_size() == 2 and values.data_ptr() % 8 == 0


def _low_rank(inputs: torch.Tensor, A: torch.Tensor, dependent: bool) -> torch.Tensor:
    count, rank, ins = inputs.shape[0], *A.shape
    u = inputs.new_empty((count, rank), dtype=torch.float32)
    width = min(4096, 1 << (ins - 1).bit_length())
    _project[rank, count](inputs, A, u, ins, rank, WIDTH=width, DEPENDENT=dependent, num_warps=8)
    return u


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one it follows has ended (programmatic dependent launch)."""
    if device.type != "cuda" or not torch.version.cuda:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9
