# ruff: noqa: RUF005 (the compiler of these functions knows tuples, but not unpacking)
"""y = x S^T + (x A^T) B^T + bias for up to 16 rows of x, read once from the packed S (Triton).

At such sizes the time is that of reading S. A program owns some output rows and walks along them; a thread owns a
few columns of each (see `support`) and takes its values through the cache, where its neighbours' values already are.
Two forms: `_vector` multiplies one row of x in FP32 registers, `_matrix` gives up to 16 rows to the tensor cores.
u = x A^T is a small kernel of its own; B u and the bias join the sum before y is written, once.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .index import SupportIndex
from .support import column_bits, expand, expand_pairs, locate, multiply, read_pairs, row_start, stack

MAX_ROWS = 16  # rows of x: one tensor-core tile


@dataclass(frozen=True)
class Plan:
    """How to launch one product.

    Attributes:
        matrix: tensor cores (16-bit values) instead of one row of x at a time.
        rows: output rows of a program, a power of two.
        warps: of a program.
        columns: consecutive columns of a thread: 4 or 8; 2:4 always takes 8.
        split: programs that share an output row, each with a part of the columns (`matrix` only).
    """

    matrix: bool
    rows: int
    warps: int
    columns: int = 8
    split: int = 1


@triton.jit
def _vector(
    x,
    words,
    values,
    starts,
    offsets,
    u,
    B,
    bias,
    y,
    outs,
    ins,
    blocks,
    rank,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    sample = tl.program_id(1)
    lane = tl.arange(0, LANES)
    shift, below = column_bits(lane, COLUMNS)
    sums, begin, ahead = (), (), ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, outs - 1)
        sums = sums + (tl.zeros((LANES,), tl.float32),)
        begin = begin + (row_start(starts, row, blocks, PER_BLOCK),)
        if LOW_RANK:  # asked for early, so that it is here when the sums are done
            ahead = ahead + (tl.load(B + row * rank + lane, mask=lane < rank, other=0),)
    for k in range(0, ins, LANES * COLUMNS):
        column = k + lane * COLUMNS
        samples = ()
        for j in tl.static_range(COLUMNS):
            at = x + sample * ins + column + j
            entry = tl.load(at) if EVEN else tl.load(at, mask=column + j < ins, other=0)
            samples = samples + (entry.to(tl.float32),)
        block = k // 64 + lane * COLUMNS // 64
        updated = ()
        for i in tl.static_range(ROWS):
            row = tl.minimum(first + i, outs - 1)
            if PAIRS:
                at = row * (blocks * 8) + k // 8 + lane
                bits, pairs = read_pairs(words, values, at, column < ins, EVEN)
                total = _multiply_pairs(sums[i], bits, pairs, samples, values.dtype.element_ty)
            else:
                bits, place = locate(
                    words, offsets, begin[i], row, block, shift, below, blocks, PER_BLOCK, EVEN
                )
                total = sums[i]
                entries = expand(values, bits, place, COLUMNS)
                for j in tl.static_range(COLUMNS):
                    total += entries[j].to(tl.float32) * samples[j]
            updated = updated + (total,)
        sums = updated
    if LOW_RANK:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()  # from here on u is complete
        for q in range(0, rank, LANES):
            inside = q + lane < rank
            factor = tl.load(u + sample * rank + q + lane, mask=inside, other=0)
            updated = ()
            for i in tl.static_range(ROWS):
                row = tl.minimum(first + i, outs - 1)
                entry = ahead[i]
                if q > 0:
                    entry = tl.load(B + row * rank + q + lane, mask=inside, other=0)
                updated = updated + (sums[i] + entry.to(tl.float32) * factor,)
            sums = updated
    result = tl.sum(stack(sums), 0)
    out = first + tl.arange(0, ROWS)
    if BIAS:
        result += tl.load(bias + out, mask=out < outs, other=0).to(tl.float32)
    tl.store(y + sample * outs + out, result, mask=out < outs)


@triton.jit
def _multiply_pairs(total, bits, pairs, samples, dtype: tl.constexpr):
    """Adds eight columns of a 2:4 row: both values of a group pick their entry of x."""
    for group in tl.static_range(2):
        x0, x1 = samples[4 * group], samples[4 * group + 1]
        x2, x3 = samples[4 * group + 2], samples[4 * group + 3]
        left = tl.where((bits & (2 << 4 * group)) != 0, x1, x2)
        left = tl.where((bits & (1 << 4 * group)) != 0, x0, left)
        right = tl.where((bits & (4 << 4 * group)) != 0, x2, x1)
        right = tl.where((bits & (8 << 4 * group)) != 0, x3, right)
        total += (pairs >> 32 * group).to(tl.int16).to(dtype, bitcast=True).to(tl.float32) * left
        total += (pairs >> 32 * group + 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32) * right
    return total


@triton.jit
def dense_tile(
    words,
    values,
    starts,
    offsets,
    first,
    k,
    outs,
    ins,
    blocks,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Columns k... of S^T for output rows first...: (LANES * COLUMNS, ROWS), in the dtype of the values."""
    lane = tl.arange(0, LANES)
    shift, below = column_bits(lane, COLUMNS)
    block = k // 64 + lane * COLUMNS // 64
    tile = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, outs - 1)
        if PAIRS:
            at = row * (blocks * 8) + k // 8 + lane
            bits, pairs = read_pairs(words, values, at, k + lane * 8 < ins, EVEN)
            entries = expand_pairs(pairs, bits, values.dtype.element_ty)
        else:
            start = row_start(starts, row, blocks, PER_BLOCK)
            bits, place = locate(words, offsets, start, row, block, shift, below, blocks, PER_BLOCK, EVEN)
            entries = expand(values, bits, place, COLUMNS)
        tile = tile + (stack(entries),)
    return stack(tile).reshape(LANES * COLUMNS, ROWS)


@triton.jit
def _matrix(
    x,
    words,
    values,
    starts,
    offsets,
    u,
    B,
    bias,
    y,
    outs,
    ins,
    blocks,
    rank,
    count,
    span,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BATCH: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    part = tl.program_id(1)
    sample = tl.arange(0, BATCH)[:, None]
    out = first + tl.arange(0, ROWS)[None, :]
    inner = tl.arange(0, LANES * COLUMNS)[None, :]
    present = (sample < count) & (out < outs)
    total = tl.zeros((BATCH, ROWS), tl.float32)
    for k in range(part * span, tl.minimum(part * span + span, ins), LANES * COLUMNS):
        tile = dense_tile(
            words, values, starts, offsets, first, k, outs, ins, blocks,
            ROWS, LANES, COLUMNS, PER_BLOCK, PAIRS, EVEN,
        )  # fmt: skip
        inside = sample < count if EVEN else (sample < count) & (k + inner < ins)
        total = multiply(tl.load(x + sample * ins + k + inner, mask=inside, other=0), tile, total)
    if part == 0:
        if LOW_RANK:
            if DEPENDENT:
                tl.extra.cuda.gdc_wait()
            for q in range(0, rank, 32):
                factor = q + tl.arange(0, 32)
                inside = (factor < rank)[None, :] & (sample < count)
                left = tl.load(u + sample * rank + factor[None, :], mask=inside, other=0)
                inside = (factor < rank)[:, None] & (out < outs)
                right = tl.load(B + out * rank + factor[:, None], mask=inside, other=0)
                total = multiply(left.to(right.dtype), right, total)
        if BIAS:
            total += tl.load(bias + out, mask=out < outs, other=0).to(tl.float32)
    tl.store(y + (part * count + sample) * outs + out, total, mask=present)


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


@triton.jit
def _add_parts(parts, y, size, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * size + at, mask=at < size, other=0)
    tl.store(y + at, total, mask=at < size)


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
        inputs: x (rows, in), 1 to 16 rows.
        mask: the packed mask, `index` its index.
        values: (nonzeros,), A (rank, in), B (out, rank) and bias (out,): the dtype and device of the inputs.

    Returns:
        (rows, out), the dtype of the inputs.
    """
    count, ins = inputs.shape
    outs, blocks = index.shape
    inputs, values = inputs.contiguous(), values.contiguous()
    rank = 0 if A is None else A.shape[0]
    dependent = bool(rank) and _can_overlap(inputs.device)
    y = inputs.new_empty((count, outs))
    u = _low_rank(inputs, A.contiguous(), dependent) if rank else y
    shared = (index.words(mask), values, index.starts, index.offsets, u, B.contiguous() if rank else y)
    shared = (*shared, y if bias is None else bias.contiguous())
    pairs = can_pair(index, values)
    columns = 8 if pairs else plan.columns
    tile = 32 * plan.warps * columns
    constants = {
        "ROWS": plan.rows, "LANES": 32 * plan.warps, "COLUMNS": columns, "PER_BLOCK": index.per_block,
        "PAIRS": pairs, "EVEN": ins % tile == 0, "LOW_RANK": bool(rank), "BIAS": bias is not None,
        "DEPENDENT": dependent, "num_warps": plan.warps, "num_stages": 1,
    }  # fmt: skip
    if dependent:
        constants["launch_pdl"] = True
    programs = triton.cdiv(outs, plan.rows)
    if not plan.matrix:
        _vector[programs, count](inputs, *shared, y, outs, ins, blocks, rank, **constants)
        return y
    split = min(plan.split, triton.cdiv(ins, tile))
    span = triton.cdiv(triton.cdiv(ins, tile), split) * tile
    target = y if split == 1 else torch.empty((split, count, outs), dtype=torch.float32, device=y.device)
    _matrix[programs, split](
        inputs, *shared, target, outs, ins, blocks, rank, count, span, BATCH=MAX_ROWS, **constants
    )
    if split > 1:
        _add_parts[(triton.cdiv(y.numel(), 512),)](target, y, y.numel(), SPLIT=split, WIDTH=512)
    return y


def can_pair(index: SupportIndex, values: torch.Tensor) -> bool:
    """Whether four values can be read as one word at a known place."""
    return index.pairs and values.element_size() == 2 and values.data_ptr() % 8 == 0


def _low_rank(inputs: torch.Tensor, A: torch.Tensor, dependent: bool) -> torch.Tensor:
    u = torch.empty((len(inputs), len(A)), dtype=torch.float32, device=inputs.device)
    width = min(1024, triton.next_power_of_2(A.shape[1]))
    _project[len(A), len(inputs)](inputs, A, u, A.shape[1], len(A), WIDTH=width, DEPENDENT=dependent)
    return u


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one it follows has ended (programmatic dependent launch)."""
    if device.type != "cuda" or not torch.version.cuda:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9
