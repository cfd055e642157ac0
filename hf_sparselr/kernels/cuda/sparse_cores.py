"""x S^T + (x A^T) B^T + bias by the sparse tensor cores, for 2:4 and many rows of x (cuSPARSELt, through torch).

S is in their layout for the length of one call. cuSPARSELt keeps the values in the order of the packed form. Two bits a
value follow, which say in which of four columns it is. So the values are copied and the mask is translated
(`torch._cslt_compress`, from a dense matrix, takes 1.85 ms for 14336 x 4096 on an H100).

The order of those bits is not documented. It was found by compressing matrices whose groups keep other columns where a
bit of the group's number is set, and is compared with what torch makes, bit for bit, before a device is used: tiles of
64 rows x 32 columns, row by row of tiles, 32 words of 64 bits each. A word belongs to rows r and r + 8; its bytes to
groups 0, 4, 1, 5, 2, 6, 3, 7 of four columns, row r in the low half of each. Words are in the order of r: 0 to 7, 16 to
23, 32 to 39, 48 to 55.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ...format.bitmask import pack_mask
from ..bindings import Product
from ..launch import TritonLaunch, Varying
from ..launch_config import JOINED, LaunchConfig
from ..packed_weight import PackedWeight
from ..support_index import index_of
from ..timing import milliseconds
from ..triton.decode import can_pair, ceil_div
from ..triton.unpack_then_gemm import bind_unpacked

_ROWS, _COLUMNS = 64, 32  # of S in a tile of places
_CHUNK = 512  # columns of a program


@triton.jit
def _arrange(words, values, B, out, ins, width, rank, places, chunks, CHUNK: tl.constexpr, PAIRS: tl.constexpr):
    top, chunk = tl.program_id(0) * 64, tl.program_id(1)
    if chunk < chunks:
        _take_over(words, values, out, ins, width, places, top, chunk, CHUNK)
    else:
        _join(B, out, ins, width, rank, places, top, PAIRS)


@triton.jit
def _take_over(words, values, out, ins, width, places, top, chunk, CHUNK: tl.constexpr):
    """Values and places of S."""
    row = top + tl.arange(0, 64)[:, None]
    four = chunk * (CHUNK // 8) + tl.arange(0, CHUNK // 8)[None, :]  # values
    value = tl.load(values.to(tl.pointer_type(tl.int64)) + row * (ins // 8) + four, mask=four < ins // 8)
    tl.store(out.to(tl.pointer_type(tl.int64)) + row * (width // 4) + four, value, mask=four < ins // 8)
    lane = tl.arange(0, CHUNK)
    tile, number = chunk * (CHUNK // 32) + lane // 32, lane % 32
    row_of_word = top + number % 8 + number // 8 * 16
    at = words.to(tl.pointer_type(tl.uint32)) + row_of_word * (ins // 32) + tile
    upper = _places(tl.load(at, mask=tile < ins // 32, other=0))
    lower = _places(tl.load(at + ins // 4, mask=tile < ins // 32, other=0))
    to = places.to(tl.pointer_type(tl.uint64)) + top * (width // 32) + tile * 32 + number
    tl.store(to, upper | (lower << 4), mask=tile < ins // 32)


@triton.jit
def _join(B, out, ins, width, rank, places, top, PAIRS: tl.constexpr):
    """Those of B behind them: its even pairs of columns as groups that keep columns 0, 1, its odd ones 2, 3."""
    row = top + tl.arange(0, 64)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    value = tl.load(B.to(tl.pointer_type(tl.int32)) + row * (rank // 2) + pair, mask=pair < rank // 2)
    at = row * (width // 2) + ins // 4 + pair % 2 * (rank // 4) + pair // 2
    tl.store(out.to(tl.pointer_type(tl.int32)) + at, value, mask=pair < rank // 2)
    word = tl.arange(0, 4 * PAIRS)  # 32 for each 32 columns
    code = tl.where(word < rank, 0x4444444444444444, -0x1111111111111112)
    to = places.to(tl.pointer_type(tl.int64)) + top * (width // 32) + ins + word
    tl.store(to, code, mask=word < 2 * rank)


@triton.jit
def _places(mask):
    """Of eight groups that keep two columns: four bits each, the first column and the second, spread for a word."""
    b0, b1 = mask & 0x11111111, (mask >> 1) & 0x11111111
    b2, b3 = (mask >> 2) & 0x11111111, (mask >> 3) & 0x11111111
    first = (b1 & ~b0) | ((0x11111111 & ~(b0 | b1)) << 1)
    second = (b3 | (0x11111111 & ~b2)) | ((b2 | b3) << 1)
    codes = (first | (second << 2)).to(tl.uint64)
    return _spread(codes & 0xFFFF) | (_spread(codes >> 16) << 8)


@triton.jit
def _spread(codes):
    """Four bits to the start of each sixteen."""
    codes = (codes | (codes << 24)) & 0x000000FF000000FF
    return (codes | (codes << 12)) & 0x000F000F000F000F


def bind_arrange(weight: PackedWeight, joined: bool) -> Callable[[], torch.Tensor]:
    """Makes S, or S and B joined, (out, in + 2 rank), as cuSPARSELt keeps it: (out, 9 / 16 of the columns).

    Args:
        weight: contiguous, 2:4 of 16 bits, `out` and `in` multiples of 64; if joined, a rank that is a multiple of 32.
    """
    mask, values, _, B, _, ins = weight
    index = index_of(mask, ins)
    outs, rank = weight.out_features, weight.rank if joined else 0
    width = ins // 2 + rank  # values of a row
    chunks, pairs = ceil_div(ins, _CHUNK), max(16, 1 << (rank // 2 - 1).bit_length() if rank else 0)
    out, places = (Varying(n, values.new_empty((64,))) for n in range(2))
    arguments = (
        index.words(mask), values, B if joined else values, out, ins, width, rank, places, chunks,
    )  # fmt: skip
    constants = {"CHUNK": _CHUNK, "PAIRS": pairs, "num_warps": 8}
    launch = TritonLaunch(_arrange, (outs // _ROWS, chunks + joined), arguments, constants)
    dtype, device = values.dtype, values.device

    def arrange() -> torch.Tensor:
        out = torch.empty((outs, width + width // 8), dtype=dtype, device=device)
        launch(out, out.view(-1)[outs * width :])
        return out

    return arrange


def bind_sparse(rows: int, weights: Sequence[PackedWeight], config: LaunchConfig) -> Product:
    """The product of one weight on the sparse tensor cores."""
    (weight,) = weights
    arrange = _bind_arrange_anywhere(weight, config.joined)
    fallback: list[Product] = []

    def product(inputs: torch.Tensor, rows: int, weights: Sequence[PackedWeight]) -> list[torch.Tensor]:
        if not prepare(inputs.device, torch.cuda.is_current_stream_capturing()):  # a thread that is new to it
            if not fallback:
                fallback.append(bind_unpacked(rows, weights, JOINED))
            return fallback[0](inputs, rows, weights)
        A, B, bias, ins = weights[0][2:]
        x = inputs.view(rows, ins)
        if rows % 16:
            x = F.pad(x, (0, 0, 0, -rows % 16))
        u = None if A is None else F.linear(x, A)
        if config.joined:
            x, u = torch.cat([x, u, u], 1), None
        y = torch._cslt_sparse_mm(arrange(), x.t(), bias, transpose_result=True, alg_id=config.algorithm)
        if u is not None:
            y.addmm_(u, B.t())
        return [y[:rows].view(*inputs.shape[:-1], -1)]

    return product


def _bind_arrange_anywhere(weight: PackedWeight, joined: bool) -> Callable[[], torch.Tensor]:
    """`bind_arrange` of values and B at any address: copied, in every call, where words cannot be read from it."""
    odd = not can_pair(index_of(weight.mask, weight.in_features), weight.values)
    if not odd and not (joined and weight.B.data_ptr() % 4):
        return bind_arrange(weight, joined)

    def arrange() -> torch.Tensor:
        moved = weight._replace(values=weight.values.clone(), B=weight.B if weight.B is None else weight.B.clone())
        return bind_arrange(moved, joined)()

    return arrange


def sparse_configs(inputs: torch.Tensor, weight: PackedWeight) -> tuple[LaunchConfig, ...]:
    """The configurations to try for a 2:4 layer, with the algorithm of cuSPARSELt that is the fastest here.

    Not in FP16: there cuSPARSELt 0.8's own search for an algorithm ends with an illegal instruction on an H100.
    """
    if weight.out_features % _ROWS or weight.in_features % (2 * _COLUMNS) or inputs.dtype != torch.bfloat16:
        return ()
    times = _times(inputs.reshape(-1, weight.in_features), weight)
    ways = (False, True) if weight.rank and weight.rank % 32 == 0 else (False,)
    best = times.index(min(times)) if times else 0
    return tuple(LaunchConfig("sparse_cores", joined=way, algorithm=best) for way in ways if times)


def _times(x: torch.Tensor, weight: PackedWeight) -> list[float]:
    """Of the product by each of cuSPARSELt's algorithms, which are tried until one is refused."""
    S, x = _bind_arrange_anywhere(weight, joined=False)(), F.pad(x, (0, 0, 0, -len(x) % 16))
    times = []
    with contextlib.suppress(RuntimeError):
        for algorithm in itertools.count():
            run = functools.partial(torch._cslt_sparse_mm, S, x.t(), transpose_result=True, alg_id=algorithm)
            times.append(milliseconds(run, x.device, 5))
    return times


_PREPARED = threading.local()


def prepare(device: torch.device, capturing: bool) -> bool:
    """Whether this thread can use cuSPARSELt on a device: its first call cannot be part of a CUDA graph."""
    devices = _PREPARED.__dict__.setdefault("devices", set())
    if device not in devices and not capturing and _has_layout(device):
        torch._cslt_compress(torch.zeros(_ROWS, _ROWS, device=device, dtype=torch.bfloat16))
        devices.add(device)
    return device in devices


@functools.cache
def _has_layout(device: torch.device) -> bool:
    """Whether there is cuSPARSELt, and it has the layout that `arrange` makes."""
    outs, ins, generator = 128, 192, torch.Generator(device).manual_seed(0)
    scores = torch.rand(outs, ins // 4, 4, device=device, generator=generator)
    kept = (scores.argsort(-1).argsort(-1) < 2).view(outs, ins)
    dense = (1 + torch.rand(outs, ins, device=device, generator=generator)).bfloat16() * kept
    mask = pack_mask(kept)
    weight = PackedWeight(mask, dense[kept], None, None, None, ins)
    try:
        expected = torch._cslt_compress(dense)
        torch._cslt_sparse_mm(expected, dense[:64].t(), transpose_result=True)
    except (AttributeError, RuntimeError):  # not there, or not for such a device
        return False
    return torch.equal(expected.flatten(), bind_arrange(weight, joined=False)().flatten())
