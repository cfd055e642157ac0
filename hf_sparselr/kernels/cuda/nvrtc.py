"""CUDA C++ compiled at run time by NVRTC, which comes with torch's CUDA wheels; cubins are kept on disk."""

import ctypes
import functools
import glob
import hashlib
import importlib.resources
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

logger = logging.getLogger(__name__)

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_WITHOUT_ASKING = 48 * 1024


class CompileError(RuntimeError):
    """NVRTC is missing, or refuses a source."""


def load_function(source: str, name: str, defines: tuple[str, ...], device: int, shared: int) -> int:
    """A kernel's handle, a CUfunction, on a device.

    Args:
        source: a file beside this one, or several with "+" between, which are compiled as one.
        name: of the kernel, extern "C".
        defines: "NAME" or "NAME=VALUE".
        shared: bytes of dynamic shared memory that it is launched with.

    Raises:
        CompileError: see there.
    """
    function = ctypes.c_void_p()
    module = _module(source, defines, device)
    _check(_cuda().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
    if shared > _SHARED_WITHOUT_ASKING:
        _check(_cuda().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared), name)
    return function.value


@functools.cache
def _module(source: str, defines: tuple[str, ...], device: int) -> ctypes.c_void_p:
    """Loaded for good: one for each combination of defines that a model needs."""
    files = map(importlib.resources.files(__package__).joinpath, source.split("+"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    major, minor = torch.cuda.get_device_capability(device)
    options = (f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *(f"-D{define}" for define in defines))
    library = _nvrtc()
    key = hashlib.sha256("\0".join((text, *options, str(_version(library)))).encode()).hexdigest()[:24]
    file = Path(HF_HOME) / "hf_sparselr" / f"{Path(source).stem}-{key}.cubin"
    try:
        cubin = file.read_bytes()
    except OSError:
        cubin = _compile(library, text, source, options)
        _keep(file, cubin)
    module = ctypes.c_void_p()
    _check(_cuda().cuModuleLoadData(ctypes.byref(module), cubin), source)
    return module


def _compile(library: ctypes.CDLL, text: str, name: str, options: tuple[str, ...]) -> bytes:
    program = ctypes.c_void_p()
    given = [option.encode() for option in options]
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None), name)
    try:
        status = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        size = ctypes.c_size_t()
        if status:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise CompileError(f"{name}: {log.value.decode(errors='replace')}")
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), name)
        cubin = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, cubin), name)
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _keep(file: Path, cubin: bytes) -> None:
    """A folder that cannot be written only costs compiling again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".cubin", delete=False) as target:
            target.write(cubin)
        os.replace(target.name, file)
    except OSError as error:
        logger.info("compiled kernels are not kept: %s", error)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Raises CompileError where there is none."""
    major = (torch.version.cuda or "0").split(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"]
    for folder in sys.path:
        names += glob.glob(os.path.join(folder, "nvidia", "*", "lib", f"libnvrtc.so.{major}"))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompileError(f"no libnvrtc.so.{major} found")


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, name: str) -> None:
    if status:
        raise CompileError(f"{name}: error {status}")
