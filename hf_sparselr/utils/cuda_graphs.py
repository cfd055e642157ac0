"""Functions replayed as CUDA graphs: launched one by one, many small kernels leave a GPU idle."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

logger = logging.getLogger("hf_sparselr")


class GraphedCallable:
    """Calls a function; on CUDA, from the second call with arguments of the same shapes on, replays a graph of it.

    Args:
        function: works on the device and does not look at results. Tensors that it reads or changes beside its
            arguments stay at their addresses. A function that cannot be captured is called as it is.
        device: on which the function works. On any other than CUDA the function is called as it is.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._calls: dict[Any, Callable[[list], Any] | None] = {}
        self._stream = _side_stream(device) if device.type == "cuda" else None

    def __call__(self, *args: Any) -> Any:
        """The function's result, in new tensors. Arguments are nested containers of tensors and constants."""
        if self._stream is None:
            return self._function(*args)
        leaves, structure = tree_flatten(args)
        key = (str(structure), *map(_kind, leaves))
        if key in self._calls:
            self._calls[key] = self._calls[key] or self._captured(leaves, structure)
            return self._calls[key](leaves)
        # The first call is not captured: it creates the state that is created once, such as an optimiser's.
        self._calls[key] = None
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)  # a capture must not meet what began on the default stream
        with torch.cuda.stream(self._stream):
            result = self._function(*args)
        current.wait_stream(self._stream)
        return result

    def _captured(self, leaves: list, structure: Any) -> Callable[[list], Any]:
        """A graph for arguments like these. It holds no reference to `self`, so its memory is free without `gc`."""
        function = self._function
        own = tree_map(lambda leaf: leaf.to(self._device, copy=True) if _is_tensor(leaf) else leaf, leaves)
        graph = torch.cuda.CUDAGraph()

        def call(leaves: list) -> Any:
            return function(*tree_unflatten(leaves, structure))

        def replay(leaves: list) -> Any:
            for mine, given in zip(own, leaves, strict=True):
                if _is_tensor(mine):
                    mine.copy_(given, non_blocking=True)
            graph.replay()
            return tree_map(lambda result: result.clone() if _is_tensor(result) else result, results)

        generator = torch.cuda.default_generators[self._stream.device_index]
        state = generator.clone_state()
        try:
            with capturing(graph, self._device):
                results = call(own)
            return replay
        except RuntimeError as error:
            generator.graphsafe_set_state(state)  # its own now takes itself to be captured for good
            logger.info(f"not replayed as a CUDA graph: {error}")
            return call


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Inside, the work of this thread on a device is captured into a graph, on a stream of its own.

    Tensors that are made inside must be consumed before the next replay of any graph. `torch.cuda.graph` would first
    give all free memory back to the driver, pinned memory too, and so take longer than the capture.
    """
    stream, current = _side_stream(device), torch.cuda.current_stream(device)
    last = _SHARED[-1].get(stream.device_index) if _SHARED else None
    pool = () if last is None else (last.pool(),)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        graph.capture_begin(*pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
    if _SHARED:
        _SHARED[-1][stream.device_index] = graph


@contextmanager
def one_pool() -> Iterator[None]:
    """Inside, all captured graphs share their memory, which is free after it. Otherwise each leaves its own behind."""
    _SHARED.append({})
    try:
        yield
    finally:
        _SHARED.pop()


# Of every `one_pool`, the last captured graph of each device: it keeps the pool alive.
_SHARED: list[dict[int, torch.cuda.CUDAGraph]] = []


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for captures on a device: cuBLAS keeps 64 MB for every stream that it has worked on."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _stream(index)


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _kind(leaf: Any) -> Any:
    """Two calls may share a graph if their leaves have equal kinds."""
    return (leaf.shape, leaf.stride(), leaf.dtype) if _is_tensor(leaf) else repr(leaf)
