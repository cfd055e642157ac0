"""Tensors derived from parameters once and kept beside them: tables of the mask, S + B A on request.

Kept here, by the storage they come from, and not in the modules: modules are copied, moved, saved and traced.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")

_KEPT: dict[tuple, tuple[list[StorageWeakRef], list[int], Any]] = {}


def keep(name: str, sources: tuple[torch.Tensor | None, ...], build: Callable[[], T]) -> T:
    """What `build` made of these tensors when they were as they are now; builds it (again) if they are new.

    An edit is noticed by the tensor's version, so one through `.data` is not. What was made before it is dropped.

    Raises:
        RuntimeError: it would have to be built while a CUDA graph is being captured.
    """
    tensors = [tensor for tensor in sources if tensor is not None]
    key = (name, *(_identity(tensor) for tensor in sources))
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    if key in _KEPT and _KEPT[key][1] == versions and not _is_expired(key):
        return _KEPT[key][2]
    for old in [old for old in _KEPT if old == key or _is_expired(old)]:
        del _KEPT[old]
    value = apart(build, tensors[0].device)
    _KEPT[key] = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors], versions, value
    return value


def _is_expired(key: tuple) -> bool:
    return any(reference.expired() for reference in _KEPT[key][0])


def _identity(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.shape)


def apart(run: Callable[[], T], device: torch.device, stream: torch.cuda.Stream | None = None) -> T:
    """Runs `run` on a thread and a stream of its own, after all work of the current stream: what it allocates must
    outlive the memory pool of a CUDA graph whose warm-up this may be, and it may capture a graph itself.

    Args:
        stream: which nothing else uses meanwhile; None: a new one.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    if device.type != "cuda":
        return run()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a packed layer is new to this CUDA graph capture: run the model once before capturing"
        )
    torch.cuda.current_stream(device).synchronize()
    number = torch.cuda.current_device() if device.index is None else device.index

    def work() -> T:
        torch.cuda.set_device(number)  # a new thread has none, and cuBLAS would warn
        own = stream or torch.cuda.Stream(device)
        with torch.no_grad(), torch.cuda.stream(own):
            value = run()
        own.synchronize()
        return value

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
