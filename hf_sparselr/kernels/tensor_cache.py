"""Things derived from tensors once and kept as long as the tensors live: tables of the mask, kernels ready to launch.

Kept here, by the memory they come from, and not in the modules: modules are copied, moved, saved and traced.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class TensorCache(Generic[T]):
    """Entries that are dropped when the memory of one of their source tensors is freed. Threads may share it.

    A key must say where in memory the sources lie: as no entry outlives their memory, an address means one thing.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[T, list[weakref.finalize]]] = {}
        self._building = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Any) -> T | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def put(self, key: Any, value: T, sources: Iterable[torch.Tensor]) -> T:
        """Keeps a value, in the place of one of the same key. It must not hold the sources' memory itself."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in sources}
        with self._building:
            self.drop(key)
            watches = [weakref.finalize(storage, self.drop, key) for storage in storages.values()]
            for watch in watches:
                watch.atexit = False
            self._entries[key] = value, watches
        return value

    def drop(self, key: Any) -> None:
        entry = self._entries.pop(key, None)
        for watch in () if entry is None else entry[1]:
            watch.detach()

    def keep(self, key: Any, sources: list[torch.Tensor], build: Callable[[], T], fits: Callable[[T], bool]) -> T:
        """The entry of this key if it still fits; else builds it, once for all threads."""
        value = self.get(key)
        if value is not None and fits(value):
            return value
        with self._building:
            value = self.get(key)
            if value is not None and fits(value):
                return value
            return self.put(key, build(), sources)


def version(tensor: torch.Tensor) -> int:
    """Counts the edits of a tensor. Tensors made in inference mode count none."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def apart(run: Callable[[], T], device: torch.device, stream: torch.cuda.Stream | None = None) -> T:
    """Runs `run` on a thread and a stream of its own, after all work of the current stream. Its allocations must
    outlive the memory pool of a CUDA graph whose warm-up this may be, and it may capture a graph itself.

    Args:
        stream: which nothing else uses meanwhile; None: a new one.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    if device.type != "cuda":
        return run()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a packed layer is new to this CUDA graph capture: run the model once before capturing")
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
