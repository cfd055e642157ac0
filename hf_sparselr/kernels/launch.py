"""Kernel launches whose arguments are in place: a call fills in what varies and hands the rest to the CUDA driver.

Triton's own launch looks at every argument anew: 45 us on the host for a packed layer, where this takes 4.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .tensor_cache import apart

logger = logging.getLogger(__name__)

_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@dataclass(frozen=True)
class Varying:
    """An argument that a call gives: which of those that it gives (each once), and an example of its dtype."""

    number: int
    example: Any


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint32),
    ]  # fmt: skip


class DriverLaunch:
    """One launch of a CUDA function by the driver. Threads may share it.

    Args:
        function: its handle, a CUfunction.
        grid, block: in programs and threads, one to three numbers each.
        shared: bytes of dynamic shared memory.
        arguments: integers, tensors or `Varying`, in order; of a tensor, its address is kept, not its memory.
        overlaps: may start before the kernel it follows has ended (programmatic dependent launch).
    """

    def __init__(
        self,
        function: int,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared: int,
        arguments: Iterable[Any],
        overlaps: bool = False,
    ) -> None:
        arguments = list(arguments)
        self._function, self._device = function, torch.cuda.current_device()
        self._values = (ctypes.c_uint64 * len(arguments))()
        step, base = ctypes.sizeof(ctypes.c_uint64), ctypes.addressof(self._values)
        self._places = (ctypes.c_void_p * len(arguments))(*(base + step * i for i in range(len(arguments))))
        varying = {argument.number: i for i, argument in enumerate(arguments) if isinstance(argument, Varying)}
        self._varying = [varying[number] for number in range(len(varying))]  # the place of each
        for place, argument in enumerate(arguments):
            if not isinstance(argument, Varying):
                self._values[place] = _word(argument)
        attribute = _Attribute(_SERIALIZATION, 0, (ctypes.c_uint32 * 16)(1))
        self._config = _Config(
            (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))),
            (ctypes.c_uint32 * 3)(*block, *[1] * (3 - len(block))),
            shared, None, ctypes.pointer(attribute), int(overlaps),
        )  # fmt: skip
        self._address = ctypes.addressof(self._config)
        self._launch = _driver().cuLaunchKernelEx
        self._lock = threading.Lock()

    @property
    def content(self) -> tuple[int, tuple[int, ...], int, int, bool, list[int], list[int]]:
        """function, grid, threads, shared bytes, overlaps, the arguments as words, and the places of the `Varying`."""
        config = self._config
        threads = config.block[0] * config.block[1] * config.block[2]
        return (
            self._function, tuple(config.grid), threads, config.shared, bool(config.count), list(self._values),
            self._varying,
        )  # fmt: skip

    takes_addresses = True

    def __call__(self, *varying: Any, grid: tuple[int, int, int] | None = None) -> None:
        """Launches on the current stream, with these tensors and integers in the places of the `Varying`.

        Raises:
            RuntimeError: the driver refuses.
        """
        values, config = self._values, self._config
        with self._lock:
            for place, value in zip(self._varying, varying, strict=True):
                values[place] = value if type(value) is int else value.data_ptr()
            if grid is not None:
                config.grid[:] = grid
            config.stream = torch._C._cuda_getCurrentRawStream(self._device)
            status = self._launch(self._address, self._function, self._places, None)
            if status == _NO_CONTEXT:
                _give_context(self._device)
                status = self._launch(self._address, self._function, self._places, None)
        if status:
            raise RuntimeError(f"CUDA refused to launch a kernel: error {status}")


COUNTERS = 64  # bytes at the start of scratch memory that are zero between launches
_SCRATCH: dict[tuple[int, int], tuple[int, int, torch.Tensor]] = {}  # of a device and stream: address, bytes, memory


def scratch(device: int, size: int) -> int | None:
    """The address of memory that launches of the current stream use one after the other, of `size` bytes or more; None
    while a CUDA graph is captured, which may run beside this stream later."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return None
    key = device, torch._C._cuda_getCurrentRawStream(device)
    kept = _SCRATCH.get(key)
    if kept is None or kept[1] < size:
        where, size = torch.device("cuda", device), max(2**18, size)
        memory = apart(lambda: torch.zeros(size, dtype=torch.uint8, device=where), where)
        kept = _SCRATCH[key] = memory.data_ptr(), size, memory
        for notice in _NOTICES:
            notice(*key, *kept[:2])
    return kept[0]


_NOTICES: list[Callable[[int, int, int, int], Any]] = []


def on_new_scratch(notice: Callable[[int, int, int, int], Any]) -> None:
    """Calls a function with device, stream, address and bytes of every piece of scratch memory, those that are there
    first."""
    _NOTICES.append(notice)
    for key, kept in _SCRATCH.items():
        notice(*key, *kept[:2])


def _word(argument: Any) -> int:
    return argument if isinstance(argument, int) else argument.data_ptr()


_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_WITHOUT_ASKING = 48 * 1024


def load_cubin(cubin: bytes, name: str, device: int, shared: int) -> int:
    """The handle of a kernel, a CUfunction. Loaded for good.

    Args:
        device: the current one.
        shared: bytes of dynamic shared memory that it is launched with.

    Raises:
        RuntimeError: the driver refuses.
    """
    _give_context(device)
    module, function = ctypes.c_void_p(_module(cubin, device)), ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
    if shared > _SHARED_WITHOUT_ASKING:
        _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared), name)
    return function.value or 0


@functools.cache
def _module(cubin: bytes, device: int) -> int:
    """A CUmodule on the current device."""
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "a kernel")
    return module.value or 0


_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def _give_context(device: int) -> None:
    """Makes torch's context on a device this thread's, if it has none: a new thread has none before torch calls CUDA's
    runtime there."""
    context, driver = ctypes.c_void_p(), _driver()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "the context of a thread")
    if not context:
        _check(driver.cuCtxSetCurrent(_primary_context(device)), "the context of a thread")


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(number), device), "a device")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number), "the context of a device")
    return context


def _check(status: int, name: str) -> None:
    if status:
        raise RuntimeError(f"CUDA's driver, {name}: error {status}")


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


class TritonLaunch:
    """One launch of a Triton kernel: by the driver where that is possible, else by Triton.

    Args:
        kernel: a function of `triton.jit`.
        grid: of programs.
        arguments: nested tuples of integers, tensors and `Varying`, as the kernel takes them.
        constants: its compile-time arguments and Triton's options.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self.bound = _bind(kernel, grid, arguments, constants) if drives() else None
        self._arguments = None if self.bound else arguments

    @property
    def takes_addresses(self) -> bool:
        """Whether an integer may stand for a tensor, as its address."""
        return self.bound is not None

    def __call__(self, *varying: Any, grid: tuple[int, int, int] | None = None) -> None:
        """As `DriverLaunch`."""
        if self.bound is not None:
            self.bound(*varying, grid=grid)
        else:
            self._kernel[grid or self._grid](*_fill(self._arguments, varying), **self._constants)


def _fill(argument: Any, varying: tuple) -> Any:
    if isinstance(argument, Varying):
        return varying[argument.number]
    return tuple(_fill(item, varying) for item in argument) if isinstance(argument, tuple) else argument


def _example(argument: Any) -> Any:
    if isinstance(argument, Varying):
        return argument.example
    return tuple(map(_example, argument)) if isinstance(argument, tuple) else argument


_COMPILING = threading.Lock()
_OF_ANOTHER_TRITON = (AttributeError, KeyError, TypeError, ValueError, RuntimeError)


def _bind(kernel: Any, grid: tuple, arguments: tuple, constants: dict[str, Any]) -> DriverLaunch | None:
    """The launch of the kernel that Triton compiles for such arguments, which ends them with two pointers to scratch
    memory that these kernels do not use."""
    with _COMPILING:  # what another thread compiles, this one finds
        compiled = kernel.run(*map(_example, arguments), grid=grid, warmup=True, **constants)
    try:
        metadata, types = compiled.metadata, list(compiled.src.signature.values())[: len(arguments)]
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
            return None
        flat = [argument for argument, kind in _flatten(arguments, types) if kind != "constexpr"]
        return DriverLaunch(
            load_cubin(compiled.asm["cubin"], metadata.name, torch.cuda.current_device(), metadata.shared),
            grid,
            (32 * metadata.num_warps,),
            metadata.shared,
            [*flat, 0, 0],
            metadata.launch_pdl,
        )
    except _OF_ANOTHER_TRITON as error:
        _say_slow(error)
        return None


def _flatten(argument: Any, kind: Any) -> list[tuple[Any, Any]]:
    if isinstance(argument, tuple) and not isinstance(kind, str):
        return [pair for item in zip(argument, kind, strict=True) for pair in _flatten(*item)]
    return [(argument, kind)]


_UNKNOWN: list[Exception] = []


def _say_slow(error: Exception) -> None:
    if not _UNKNOWN:
        logger.warning("packed layers are launched several times slower than they could be: %r", error)
    _UNKNOWN.append(error)


def drives() -> bool:
    """Whether launches go to the driver: on NVIDIA GPUs, with a Triton that is known, not in its interpreter."""
    return _has_driver() and not _UNKNOWN


@functools.cache
def _has_driver() -> bool:
    import triton

    return bool(torch.version.cuda) and torch.cuda.is_available() and not triton.knobs.runtime.interpret
