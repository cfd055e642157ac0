"""Descriptions of matrices for the tensor memory accelerator of compute capability 9.0."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

_SHARED_ROWS = {64: 2, 128: 3}  # bytes of a row in shared memory: CU_TENSOR_MAP_SWIZZLE_64B, _128B
_UINT16, _L2_256B = 1, 3
_WORDS = 16
_ANY_ROWS = 2**31  # of a matrix whose rows differ from call to call: the kernel reads none that is not there


def tensor_map(address: int, rows: int | None, columns: int, box: tuple[int, int]) -> list[int]:
    """A CUtensorMap, as 16 words, for a matrix of 16-bit entries, row after row. The first word is the address.

    Args:
        address: of the matrix, a multiple of 16.
        rows: None: not known.
        columns: a multiple of eight.
        box: rows and columns of a tile, at most 256 rows and 64 or 32 columns.

    Raises:
        RuntimeError: the driver refuses.
    """
    memory = ctypes.create_string_buffer(128 + 64)
    start = -(-ctypes.addressof(memory) // 64) * 64
    status = _encode()(
        start, _UINT16, 2, address, (ctypes.c_uint64 * 2)(columns, rows or _ANY_ROWS),
        (ctypes.c_uint64 * 1)(2 * columns), (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1), 0,
        _SHARED_ROWS[2 * box[1]], _L2_256B, 0,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"CUDA's driver refuses a tensor map of {rows} x {columns} in {box}: error {status}")
    return list((ctypes.c_uint64 * _WORDS).from_address(start))


@functools.cache
def starts_with_address() -> bool:
    """Whether another address is another first word, and nothing else: so that a call can put it there."""
    try:
        one, other = (tensor_map(address, None, 64, (8, 64)) for address in (2**20, 2**33 + 2**21))
    except (RuntimeError, OSError, AttributeError):
        return False
    return one[0] == 2**20 and other[0] == 2**33 + 2**21 and one[1:] == other[1:]


@functools.cache
def _encode() -> Callable[..., Any]:
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, number, ctypes.c_uint32, pointer, *[pointer] * 4, *[number] * 4]
    return function
