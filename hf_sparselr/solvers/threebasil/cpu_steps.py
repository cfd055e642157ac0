"""The elementwise steps of `admm` on the CPU in C (`cpu_steps.c`), each in one pass over memory.

The same steps as torch operators can take two to three times as long as the large product.
"""

import ctypes
import functools
import importlib.resources

import torch

from ...format.patterns import NM
from ...utils.c_compiler import load


def available() -> bool:
    """Whether a C compiler made the steps; the first call may compile."""
    return _library() is not None


def correction(T: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, L: torch.Tensor, rho: float) -> torch.Tensor:
    """`admm._correction` of FP32 matrices."""
    Z = torch.empty_like(W)
    pointers = (tensor.data_ptr() for tensor in (T, mask, W, L))
    _library().correction(*pointers, rho, Z.data_ptr(), Z.numel(), torch.get_num_threads())
    return Z


def move(T: torch.Tensor, mask: torch.Tensor, W: torch.Tensor, E: torch.Tensor, pattern: NM | None) -> None:
    """`admm._sparse` of FP32 matrices."""
    pointers = (tensor.data_ptr() for tensor in (T, mask, W, E))
    if pattern is None:
        _library().move(*pointers, T.numel(), torch.get_num_threads())
    else:
        _library().move_groups(*pointers, T.numel(), pattern.n, pattern.m, torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load(
        "steps",
        importlib.resources.files(__package__).joinpath("cpu_steps.c").read_text(encoding="utf-8"),
        "layers are solved on the CPU without a compiled step, up to half as fast (%s): install a C compiler with "
        "OpenMP",
    )
    if library is None:
        return None
    pointers, size, number = [ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int
    library.correction.argtypes = [*pointers, ctypes.c_float, ctypes.c_void_p, size, number]
    library.move.argtypes = [*pointers, size, number]
    library.move_groups.argtypes = [*pointers, size, number, number, number]
    for function in (library.correction, library.move, library.move_groups):
        function.restype = None
    return library
