"""Where the weights of a model's blocks are while the block loop runs: in the model itself, or in files.

The loop asks for one block at a time. With `StreamedBlocks` the model is a skeleton: its blocks are on the meta device,
and hold data only inside `loaded`, or while they compute inside `on_call`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..nn.packed_experts import ExpertStack
from ..nn.pointwise import PointwiseConvolution, is_pointwise
from ..utils.memory import release_memory
from ..utils.modules import replace_module, tensor_place
from .capture import instance_forwards
from .convolutions import LEAF
from .experts import expert_weights, fused_weights
from .model_structure import find_blocks, shared_tensors

Tensors = dict[str, torch.Tensor]


class BlockSource:
    """The blocks of a model in memory.

    Attributes:
        edited: names of tensors that `loaded` saw the model write to.
    """

    streamed = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.edited: set[str] = set()

    def loaded(self, name: str) -> AbstractContextManager[nn.Module]:
        """Inside, the block of this name holds its weights."""
        return nullcontext(self.model.get_submodule(name))

    def on_call(self) -> AbstractContextManager[None]:
        """Inside, passes of the whole model can run: each block holds its weights while it computes."""
        return nullcontext()

    def finish(self, name: str, block: nn.Module) -> None:
        """The sink: puts a finished block into the model, wherever its dense self is."""
        replace_module(self.model, self.model.get_submodule(name), block)


class StreamedBlocks(BlockSource):
    """Blocks that are read from files when they are needed.

    Args:
        model: its blocks are on the meta device, except for tensors that other parts of it share.
        read: {name in the block: tensor} of a dense block, by its dotted name.
        file_of: the file with the tensors of a finished block, by its dotted name.
    """

    streamed = True

    def __init__(self, model: nn.Module, read: Callable[[str], Tensors], file_of: Callable[[str], Path]) -> None:
        super().__init__(model)
        self._read, self._file_of, self._shared = read, file_of, shared_tensors(model)
        self._finished: set[str] = set()

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        block = self.model.get_submodule(name)
        empty = [inner for inner, tensor in block.state_dict().items() if tensor.is_meta]
        places = [(inner, *tensor_place(block, inner)) for inner in empty]
        tensors = self._tensors(name, block) if places else {}
        versions = {}
        for inner, container, key, placeholder in places:
            container[key] = _filled(placeholder, tensors.pop(inner))
            versions[inner] = container[key]._version
        del tensors
        try:
            yield block
        finally:
            for inner, container, key, placeholder in places:
                if container[key]._version != versions[inner]:
                    self.edited.add(f"{name}.{inner}")
                container[key] = placeholder

    @contextmanager
    def on_call(self) -> Iterator[None]:
        blocks = find_blocks(self.model)
        names = list(blocks)

        def make(index: int, forward: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.loaded(names[index]):
                    return forward(*args, **kwargs)

            return run

        with instance_forwards(list(blocks.values()), make):
            yield

    def finish(self, name: str, block: nn.Module) -> None:
        state = block.state_dict(keep_vars=True)
        for inner in [inner for inner, tensor in state.items() if id(tensor) not in self._shared]:
            container, key, tensor = tensor_place(block, inner)
            container[key] = _placeholder(tensor)
        self._finished.add(name)
        super().finish(name, block)
        release_memory()

    def state_dict(self) -> Tensors:
        """All tensors of the model; those of blocks are views of files."""
        state = self.model.state_dict()
        for name, block in find_blocks(self.model).items():
            empty = [inner for inner, tensor in block.state_dict().items() if tensor.is_meta]
            if empty:
                tensors = self._tensors(name, block)
                state |= {f"{name}.{inner}": tensors[inner] for inner in empty}
        return state

    def _tensors(self, name: str, block: nn.Module) -> Tensors:
        return _named_as(block, load_file(self._file_of(name)) if name in self._finished else self._read(name))


def _named_as(block: nn.Module, tensors: Tensors) -> Tensors:
    """Tensors by the names in a block: experts and convolutions may have become layers since they were stored, or back.

    Args:
        tensors: changed.
    """
    for name, module in block.named_modules():
        if isinstance(module, ExpertStack) and name in tensors:
            weights = expert_weights(tensors.pop(name), module)
            tensors |= {f"{name}.{expert}.weight": weight for expert, weight in enumerate(weights)}
        elif isinstance(module, PointwiseConvolution) and f"{name}.weight" in tensors:
            tensors[f"{name}.{LEAF}.weight"] = tensors.pop(f"{name}.weight").flatten(1)
            if f"{name}.bias" in tensors:
                tensors[f"{name}.{LEAF}.bias"] = tensors.pop(f"{name}.bias")
        elif is_pointwise(module) and f"{name}.{LEAF}.weight" in tensors:
            tensors[f"{name}.weight"] = tensors.pop(f"{name}.{LEAF}.weight").view(module.weight.shape)
            if module.bias is not None:
                tensors[f"{name}.bias"] = tensors.pop(f"{name}.{LEAF}.bias")
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if key not in tensors and f"{key}.0.weight" in tensors:
                tensors[key] = fused_weights(tensors, key, module, parameter.shape)
    return tensors


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _filled(placeholder: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the kind and dtype of a placeholder, which may have been changed to FP32 for the moment."""
    if tensor.shape != placeholder.shape:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is stored, expected {tuple(placeholder.shape)}")
    tensor = tensor.to(placeholder.dtype)
    if isinstance(placeholder, nn.Parameter):
        return nn.Parameter(tensor, placeholder.requires_grad)
    return tensor.clone()  # a copy of a view would copy the whole file that it is a view of
