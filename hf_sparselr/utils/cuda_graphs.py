"""Functions replayed as CUDA graphs: launched one by one, many small kernels leave a GPU idle."""

import logging
from collections.abc import Callable
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
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

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
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                results = call(own)
            return replay
        except RuntimeError as error:
            generator.graphsafe_set_state(state)  # its own now takes itself to be captured for good
            logger.info(f"not replayed as a CUDA graph: {error}")
            return call


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _kind(leaf: Any) -> Any:
    """Two calls may share a graph if their leaves have equal kinds."""
    return (leaf.shape, leaf.stride(), leaf.dtype) if _is_tensor(leaf) else repr(leaf)
