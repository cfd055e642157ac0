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
import threading
from collections import defaultdict
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

from ..launch import load_cubin

logger = logging.getLogger(__name__)

_HEADERS = ("tensor_cores.cuh", "hopper.cuh", "packed_rows.cuh")  # that sources include


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
    try:
        return load_cubin(_cubin(source, defines, device), name, device, shared)
    except CompileError:
        raise
    except RuntimeError as error:
        raise CompileError(str(error)) from error


@functools.cache
def _cubin(source: str, defines: tuple[str, ...], device: int) -> bytes:
    """One for each combination of defines that a model needs, from the disk if it is there."""
    folder = importlib.resources.files(__package__)
    text = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in source.split("+"))
    headers = tuple(folder.joinpath(name).read_text(encoding="utf-8") for name in _HEADERS)
    major, minor = torch.cuda.get_device_capability(device)
    own = "a" * (major == 9)  # with the instructions that no later card has
    options = (f"--gpu-architecture=sm_{major}{minor}{own}", "--std=c++17", *(f"-D{define}" for define in defines))
    library = _nvrtc()
    key = hashlib.sha256("\0".join((text, *headers, *options, str(_version(library)))).encode()).hexdigest()[:24]
    file = Path(HF_HOME) / "hf_sparselr" / f"{Path(source).stem}-{key}.cubin"
    with _UNDER_WAY[key]:  # one thread compiles it, others wait
        try:
            return _COMPILED[key]
        except KeyError:
            pass
        try:
            cubin = file.read_bytes()
        except OSError:
            cubin = _compile(library, text, headers, source, options)
            _keep(file, cubin)
        return _COMPILED.setdefault(key, cubin)


_UNDER_WAY: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
_COMPILED: dict[str, bytes] = {}  # here too, for where nothing can be kept on disk


def _compile(library: ctypes.CDLL, text: str, headers: tuple[str, ...], name: str, options: tuple[str, ...]) -> bytes:
    program = ctypes.c_void_p()
    given = [option.encode() for option in options]
    contents, names = (_strings(texts) for texts in (headers, _HEADERS))
    create = library.nvrtcCreateProgram
    _check(create(ctypes.byref(program), text.encode(), name.encode(), len(headers), contents, names), name)
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


def _strings(texts: tuple[str, ...]) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


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


def _check(status: int, name: str) -> None:
    if status:
        raise CompileError(f"{name}: error {status}")
