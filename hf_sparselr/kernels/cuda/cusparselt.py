"""cuSPARSELt's product with plans that are kept: torch makes descriptors and a plan in every call, 0.2 to 0.6 ms.

The library comes with torch's CUDA wheels. A plan holds sizes and an algorithm: layers of one shape share it.
"""

import ctypes
import functools

import torch

_OPAQUE = 2048  # bytes of its structures, 512 or 1024 by version
_ALIGNMENT = 16
_BF16 = 14  # CUDA_R_16BF
_FP32_SUMS = 2  # CUSPARSE_COMPUTE_32F
_BY_COLUMN, _BY_ROW = 1, 2  # CUSPARSE_ORDER_*
_AS_IT_IS, _TRANSPOSED = 0, 1  # CUSPARSE_OPERATION_*
_ALGORITHM = 0  # CUSPARSELT_MATMUL_ALG_CONFIG_ID
_BIAS = 8  # CUSPARSELT_MATMUL_BIAS_POINTER


class CuSparseLtError(RuntimeError):
    """The library refuses."""


class _Opaque:
    """Memory of one of its structures, at an address that it is aligned to."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_OPAQUE + _ALIGNMENT)
        self.address = -(-ctypes.addressof(self._memory) // _ALIGNMENT) * _ALIGNMENT


class SparsePlan:
    """y (rows, out) = x (rows, in) S^T, all BF16, S (out, in) in cuSPARSELt's layout.

    Args:
        outs, ins: multiples of 32.
        rows: a multiple of 16.
        algorithm: its number, from 0 on.
        bias: the address of (out,), or 0.

    Raises:
        CuSparseLtError: sizes or an algorithm that the library does not take.
    """

    def __init__(self, device: int, outs: int, ins: int, rows: int, algorithm: int, bias: int = 0) -> None:
        library, handle = _library(), _handle(device)
        self._parts = [_Opaque() for _ in range(6)]
        sparse, x, y, product, choice, plan = (part.address for part in self._parts)
        number = ctypes.c_int64
        _check(
            library.cusparseLtStructuredDescriptorInit(
                handle, sparse, number(outs), number(ins), number(ins), _ALIGNMENT, _BF16, _BY_ROW, 0
            )
        )
        dense = library.cusparseLtDenseDescriptorInit
        _check(dense(handle, x, number(rows), number(ins), number(ins), _ALIGNMENT, _BF16, _BY_ROW))
        _check(dense(handle, y, number(outs), number(rows), number(outs), _ALIGNMENT, _BF16, _BY_COLUMN))
        describe = library.cusparseLtMatmulDescriptorInit
        _check(describe(handle, product, _AS_IT_IS, _TRANSPOSED, sparse, x, y, y, _FP32_SUMS))
        if bias:
            address = ctypes.c_void_p(bias)
            size = ctypes.c_size_t(ctypes.sizeof(address))
            _check(library.cusparseLtMatmulDescSetAttribute(handle, product, _BIAS, ctypes.byref(address), size))
        _check(library.cusparseLtMatmulAlgSelectionInit(handle, choice, product, 0))
        chosen = ctypes.c_int(algorithm)
        size = ctypes.c_size_t(ctypes.sizeof(chosen))
        _check(library.cusparseLtMatmulAlgSetAttribute(handle, choice, _ALGORITHM, ctypes.byref(chosen), size))
        _check(library.cusparseLtMatmulPlanInit(handle, plan, product, choice))
        workspace = ctypes.c_size_t()
        _check(library.cusparseLtMatmulGetWorkspace(handle, plan, ctypes.byref(workspace)))
        self.workspace = workspace.value  # bytes
        self.handle, self.plan = handle, plan
        self._device = device

    def __call__(self, S: int, x: int, y: int, workspace: int) -> None:
        """Enqueues the product on the current stream, by addresses.

        Raises:
            CuSparseLtError: the launch failed.
        """
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        one, zero = (ctypes.byref(ctypes.c_float(factor)) for factor in (1, 0))
        product = _library().cusparseLtMatmul
        _check(product(self.handle, self.plan, one, S, x, zero, y, y, workspace or None, ctypes.byref(stream), 1))

    @property
    def function(self) -> int:
        """The address of cusparseLtMatmul."""
        return ctypes.cast(_library().cusparseLtMatmul, ctypes.c_void_p).value or 0


@functools.lru_cache(512)
def plan_for(device: int, outs: int, ins: int, rows: int, algorithm: int, bias: int = 0) -> SparsePlan:
    """`SparsePlan`, kept."""
    return SparsePlan(device, outs, ins, rows, algorithm, bias)


@functools.cache
def _handle(device: int) -> int:
    """Of a device, which is the current one."""
    handle = _Opaque()
    _check(_library().cusparseLtInit(handle.address))
    _KEPT.append(handle)
    return handle.address


_KEPT: list[_Opaque] = []


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that torch has loaded. Its calls keep the interpreter's lock: threads share a handle.

    Raises:
        OSError: there is none.
    """
    library = ctypes.PyDLL("libcusparseLt.so.0")
    pointer, small, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.cusparseLtInit.argtypes = [pointer]
    library.cusparseLtStructuredDescriptorInit.argtypes = [pointer] * 2 + [number] * 3 + [ctypes.c_uint32] + [small] * 3
    library.cusparseLtDenseDescriptorInit.argtypes = [pointer] * 2 + [number] * 3 + [ctypes.c_uint32] + [small] * 2
    library.cusparseLtMatmulDescriptorInit.argtypes = [pointer] * 2 + [small] * 2 + [pointer] * 4 + [small]
    library.cusparseLtMatmulAlgSelectionInit.argtypes = [pointer] * 3 + [small]
    library.cusparseLtMatmulAlgSetAttribute.argtypes = [pointer] * 2 + [small, pointer, ctypes.c_size_t]
    library.cusparseLtMatmulDescSetAttribute.argtypes = [pointer] * 2 + [small, pointer, ctypes.c_size_t]
    library.cusparseLtMatmulPlanInit.argtypes = [pointer] * 4
    library.cusparseLtMatmulGetWorkspace.argtypes = [pointer] * 3
    library.cusparseLtMatmul.argtypes = [pointer] * 10 + [small]
    return library


def _check(status: int) -> None:
    if status:
        raise CuSparseLtError(f"cuSPARSELt: error {status}")
