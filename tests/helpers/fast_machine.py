"""A machine without a GPU for calls through C: torch's own functions, and some of these where the driver's would be."""

import ctypes

import torch

from hf_sparselr.kernels import fast_calls

STREAM, CONTEXT, INS = 77, 5, 16


class Machine:
    """What stands in for the driver: a launch adds its first integer to x, into y."""

    def __init__(self) -> None:
        self.capturing, self.context, self.grids, self.stream = 0, CONTEXT, [], STREAM
        pointer, number = ctypes.c_void_p, ctypes.c_int
        stream = ctypes.CFUNCTYPE(number, number, ctypes.POINTER(pointer))(self._stream)
        launch = ctypes.CFUNCTYPE(number, ctypes.POINTER(ctypes.c_uint32), pointer, ctypes.POINTER(pointer), pointer)(
            self._launch
        )
        capturing = ctypes.CFUNCTYPE(number, pointer, ctypes.POINTER(number))(self._capturing)
        context = ctypes.CFUNCTYPE(number, ctypes.POINTER(pointer))(self._context)
        self.kept = [stream, launch, capturing, context]
        address = [ctypes.cast(function, pointer).value for function in self.kept]
        cpu = fast_calls._part_of_torch("cpu")
        multiply = [
            ctypes.cast(getattr(cpu, f"aoti_torch_cpu_{name}"), pointer).value for name in ("mm_out", "addmm_out")
        ]
        of_torch = fast_calls.functions_of_torch() | dict(
            zip(fast_calls._TORCH_CUDA, [*multiply, address[0]], strict=True)
        )
        driver = dict(zip(fast_calls._DRIVER, address[1:], strict=True))
        self.library = _OnDevice(fast_calls.compiled(), of_torch, driver)

    def _stream(self, device, out):
        out[0] = self.stream
        return 0

    def _launch(self, config, function, places, extra):
        self.grids.append(tuple(config[:3]))
        source, target, count, more = (ctypes.c_int64.from_address(places[i]).value for i in range(4))
        for i in range(count * INS):
            place = 4 * i
            value = ctypes.c_float.from_address(source + place).value
            ctypes.c_float.from_address(target + place).value = value + more
        return function or 0

    def _capturing(self, stream, out):
        out[0] = self.capturing
        return 0

    def _context(self, out):
        out[0] = self.context
        return 0


class _OnDevice(fast_calls._Library):
    def context_of(self, tensor: torch.Tensor) -> int:
        return CONTEXT


class Adder:
    """A launch of `Machine`, as `DriverLaunch` has it."""

    takes_addresses = True

    def __init__(self, more: int, status: int = 0) -> None:
        self.content = (status, (3, 1, 1), 32, 0, False, [0, 0, 0, more], [0, 1, 2])
        self.bound = self
