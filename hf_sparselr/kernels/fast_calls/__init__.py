"""Calls of packed layers that go through C: a tenth of the time that Python takes to check, allocate and launch.

`FastCall` is made ready by calls through Python (`bindings`, `gpu`), whose programs it takes over. It answers None
where anything is not as it was then: other weights, gradients, autocast, modes, transforms, a graph being captured. It
needs Linux and a C compiler; elsewhere every call goes through Python.
"""

import ctypes
import functools
import importlib.resources
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from ...utils.c_compiler import load
from .. import cpu
from ..bindings import ON_CPU, Binding, binding_of
from ..launch import drives, on_new_scratch
from ..launch_config import row_key
from ..override import chosen_kernel
from ..packed_weight import PackedWeight
from ..program import Program
from ..tensor_cache import version

logger = logging.getLogger(__name__)

MEMBERS = 8  # at most, with one input
_SLOTS = 64  # of a program, at most
PARTS = ("mask", "values", "A", "B", "bias")

Parameters = dict[str, Any]  # of a module
Call = Callable[[Parameters, torch.Tensor, str], torch.Tensor | None]


def not_ready(parameters: Parameters, inputs: torch.Tensor, kernel: str) -> None:
    """Of a layer that was not prepared."""


class _Member(ctypes.Structure):
    _fields_ = [
        ("tensors", (ctypes.c_int64 * 2) * len(PARTS)), ("version", ctypes.c_int64), ("out", ctypes.c_int64),
        ("object", ctypes.c_int64),
    ]  # fmt: skip


class _Group(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "device_type", "device", "ins", "count", "context", "is_cast")),
        ("members", _Member * MEMBERS),
    ]


class FastCall:
    """Calls of layers with one input, the first of which computes the results of all.

    Args:
        binding: of the weights.
        weights: of the layers; on the current device or the CPU.
        parameters: the `_parameters` of each.
        kernel: that they were called with.
        gradient: the results are gradients of x (..., in) from those of a layer's output (..., out).
        is_cast: x comes as autocast wants it.
    """

    def __init__(
        self,
        binding: Binding,
        weights: Sequence[PackedWeight],
        parameters: Sequence[Parameters],
        kernel: str,
        gradient: bool = False,
        is_cast: bool = False,
    ) -> None:
        self.binding = binding
        library, values = _library(), weights[0].values
        group = _Group()
        group.dtype, group.device_type, group.device = library.kind_of(values)
        group.count, group.context, group.is_cast = len(weights), library.context_of(values), is_cast
        group.ins = weights[0].out_features if gradient else weights[0].in_features
        for member, weight in zip(group.members, weights, strict=False):
            for place, tensor in zip(member.tensors, weight[:5], strict=True):
                place[:] = (-1, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())
            counts = not weight.mask.is_inference()  # edits; asking such a tensor for its version takes an error
            member.version, member.object = (version(weight.mask), 0) if counts else (0, id(weight.mask))
            member.out = weight.in_features if gradient else weight.out_features
        self._learnt: set[int] = set()  # keys of rows that have a program
        self._state = library.new_group(ctypes.byref(group), kernel, list(parameters))
        self._functions = [library.function_of(self._state, first) for first in (0, 1)]

    @property
    def take(self) -> Call:
        """For the other layers: a result that waits, or None."""
        return self._functions[0]

    @property
    def call(self) -> Call:
        """For the first layer: its result, or None."""
        return self._functions[1]

    @property
    def waits(self) -> bool:
        """Whether results wait to be taken."""
        return bool(_library().waits(self._state))

    @property
    def misses(self) -> int:
        """Calls in which not all results were taken."""
        return _library().misses(self._state)

    def learn(self, rows: int, program: Program, weights: Sequence[PackedWeight]) -> None:
        """Takes over a program for so many rows of x, if its steps are for C."""
        if row_key(rows) in self._learnt:
            return
        self._learnt.add(row_key(rows))
        words = program.words(weights)
        if words is not None and 2 + len(program.outs) + len(program.memories) <= _SLOTS:
            array = (ctypes.c_int64 * len(words))(*words)
            _library().learn(self._state, rows, array, len(words))


def updated(
    fast: FastCall | None,
    weights: Sequence[PackedWeight],
    parameters: Sequence[Parameters],
    kernel: str,
    x: torch.Tensor,
    gradient: bool = False,
    is_cast: bool = False,
) -> FastCall | None:
    """A fast call with all that the call of these layers through Python, which was the last, made ready: the old one if
    it is of the same weights. None if the call is not for C.

    Args:
        fast: of earlier calls, or None.
        parameters: the `_parameters` of each layer.
        kernel: that the layers were called with.
        x: their input.
        gradient, is_cast: see `FastCall`.
    """
    if type(x) is not torch.Tensor or torch.is_grad_enabled() or len(weights) > MEMBERS:
        return None
    if not ((x.is_cpu and not gradient) or (x.is_cuda and drives())):
        return None
    if any(part is not None and part.dtype != weight.values.dtype for weight in weights for part in weight[2:5]):
        return None  # in training, factors beside S in half precision are in FP32
    binding, rows, kernel_now = binding_of(weights), x.numel() // max(1, x.shape[-1]), chosen_kernel(kernel)
    if x.is_cuda:
        program = binding.gradient if gradient else binding.products.get((row_key(rows), kernel_now))
        elsewhere = binding.device != torch.cuda.current_device()
    else:
        program, elsewhere = binding.products.get(ON_CPU), kernel_now == "dense" or not cpu.prefers(x.dtype, rows)
    if program is None or elsewhere or _library() is None:
        return None
    if fast is None or fast.binding is not binding:
        fast = FastCall(binding, weights, parameters, kernel, gradient, is_cast)
    fast.learn(rows, program, weights)
    return fast


class _Library:
    """The C library with what it needs of torch, Python and the driver.

    Raises:
        OSError, AttributeError, RuntimeError: torch or the driver is not as expected.
    """

    def __init__(self, library: ctypes.CDLL, torch_functions: dict[str, int], driver: dict[str, int]) -> None:
        python = ctypes.PyDLL(library._name)
        self._c = python
        word, pointer, held = ctypes.c_int64, ctypes.c_void_p, ctypes.py_object
        python.new_group.argtypes, python.new_group.restype = [pointer, held, held], held
        python.function_of.argtypes, python.function_of.restype = [held, ctypes.c_int], held
        python.waits.argtypes = python.misses.argtypes = [held]
        python.misses.restype = word
        python.learn.argtypes, python.learn.restype = [held, word, pointer, word], None
        python.set_scratch.argtypes = [word, pointer, word, word]
        self.new_group, self.function_of, self.learn = python.new_group, python.function_of, python.learn
        self.waits, self.misses, self.set_scratch = python.waits, python.misses, python.set_scratch
        self._driver = driver
        self._torch = torch_functions
        self._offset = _offset_of_tensor()
        objects = [
            None, torch.Tensor, torch.nn.Parameter, torch._C._is_any_autocast_enabled,
            torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack, vars(forward_ad),
            "_current_level",
        ]  # fmt: skip
        self._objects = objects  # C holds their addresses
        addresses = [*map(id, objects), self._offset, *self._torch.values(), *driver.values()]
        python.set_up.argtypes = [pointer]
        python.set_up((word * (len(addresses) + 1))(*addresses, self.kind_of(torch.empty(1, dtype=torch.uint8))[0]))

    def kind_of(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        """dtype, type and index of the device, as torch's C interface numbers them."""
        answers = []
        for name in ("get_dtype", "get_device_type", "get_device_index"):
            answer, function = ctypes.c_int32(), ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
            function(self._torch[name])(id(tensor) + self._offset, ctypes.addressof(answer))
            answers.append(answer.value)
        return tuple(answers)

    def context_of(self, tensor: torch.Tensor) -> int:
        """The current context of the driver, 0 for memory of the CPU."""
        if tensor.is_cpu:
            return 0
        context = ctypes.c_void_p()
        ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._driver["cuCtxGetCurrent"])(ctypes.addressof(context))
        return context.value or 0


_TORCH = (  # functions of torch's C interface, in the order of `struct Interface`
    "get_data_ptr", "get_numel", "get_dim", "get_sizes", "get_dtype", "get_device_type", "get_device_index",
    "is_contiguous", "grad_mode_is_enabled", "empty_strided", "create_tensor_from_blob",
    "delete_tensor_object",
)  # fmt: skip
_THREADS = "_ZN2at15get_num_threadsEv"  # int at::get_num_threads()
_TORCH_CUDA = ("cuda_mm_out", "cuda_addmm_out", "get_current_cuda_stream")
_WRAP = "_Z16THPVariable_WrapRKN2at10TensorBaseE"  # PyObject* THPVariable_Wrap(const at::TensorBase&)
_DRIVER = ("cuLaunchKernelEx", "cuStreamIsCapturing", "cuCtxGetCurrent")


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value


def functions_of_torch() -> dict[str, int]:
    """Addresses of the functions that need no CUDA, then of those that make Python objects of tensors and that count
    threads."""
    library = _part_of_torch("cpu")
    found = {name: _address(getattr(library, f"aoti_torch_{name}")) for name in _TORCH}
    others = {"wrap": getattr(_part_of_torch("python"), _WRAP), "threads": getattr(library, _THREADS)}
    return found | {name: _address(function) for name, function in others.items()}


def _part_of_torch(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", f"libtorch_{name}.so"))


def _offset_of_tensor() -> int:
    """Where in a torch.Tensor object its at::Tensor lies, which is a pointer to what `_cdata` is the address of.

    Raises:
        RuntimeError: not found.
    """
    tensors = torch.empty(1), torch.empty(2, 3).T, torch.nn.Parameter(torch.empty(1))
    size = torch.Tensor.__basicsize__
    places = [
        {place for place in range(16, size, 8) if ctypes.c_uint64.from_address(id(t) + place).value == t._cdata}
        for t in tensors
    ]
    common = set.intersection(*places)
    if len(common) != 1:
        raise RuntimeError("torch keeps its tensors otherwise")
    return common.pop()


def compiled() -> ctypes.CDLL | None:
    """The C library, if this Python can use it and there is a compiler."""
    interpreter_locks = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sys.platform != "linux" or sys.implementation.name != "cpython" or not interpreter_locks:
        return None
    source = importlib.resources.files(__package__).joinpath("fast_calls.c").read_text(encoding="utf-8")
    return load("fast_calls", source, _SLOW)


_SLOW = "calls of packed layers take the host several times longer than they could: %s"


@functools.cache
def _library() -> _Library | None:
    """None where calls have to go through Python, after a warning if that is unexpected."""
    library = compiled()
    if library is None:
        return None
    try:
        of_cuda, driver = _functions_of_cuda()
        made = _Library(library, functions_of_torch() | of_cuda, driver)
    except (OSError, AttributeError, RuntimeError) as error:
        logger.warning(_SLOW, error)
        return None
    on_new_scratch(made.set_scratch)
    return made


def _functions_of_cuda() -> tuple[dict[str, int], dict[str, int]]:
    """Addresses of torch's functions for CUDA and of the driver's; 0 where there is no NVIDIA GPU."""
    if not torch.version.cuda or not torch.cuda.is_available():
        return dict.fromkeys(_TORCH_CUDA, 0), dict.fromkeys(_DRIVER, 0)
    cuda, driver = _part_of_torch("cuda"), ctypes.CDLL("libcuda.so.1")
    return (
        {name: _address(getattr(cuda, f"aoti_torch_{name}")) for name in _TORCH_CUDA},
        {name: _address(getattr(driver, name)) for name in _DRIVER},
    )
