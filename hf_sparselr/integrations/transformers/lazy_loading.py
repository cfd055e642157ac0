"""`from_pretrained` that leaves the blocks of a model in its files, and reads them one at a time.

transformers does the work: it finds the files, builds the model, renames, converts and casts tensors. Here it is only
given fewer of them at a time.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.utils import logging

from ...compression.block_source import Tensors
from ...compression.model_structure import find_blocks, shared_tensors
from .names import StoredNames


class _FilesFound(Exception):  # noqa: N818 (not an error: ends from_pretrained early)
    pass


def checkpoint_files(cls: Any, name: str, load_kwargs: Mapping[str, Any]) -> list[str]:
    """The weight files that `cls.from_pretrained` would read, downloaded if they are on the Hub; none is read."""
    found: list[str] = []

    def load(model: Any, state_dict: Any, files: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        found.extend(files or ())
        raise _FilesFound

    with suppress(_FilesFound):
        _with_hooks(cls, load, None).from_pretrained(name, **load_kwargs)
    return found


def load_without_blocks(
    cls: type[PreTrainedModel], name: str, load_kwargs: Mapping[str, Any]
) -> tuple[PreTrainedModel, "BlockReader"]:
    """The model as from `cls.from_pretrained`, its blocks on the meta device, and what reads them.

    Tensors of a block that other parts of the model share are loaded.

    Args:
        load_kwargs: without `device_map`.

    Raises:
        SafetensorError: a file is no safetensors file.
    """
    readers: list[BlockReader] = []

    def load(model: Any, state_dict: Any, files: list[str] | None, config: Any, *args: Any, **kwargs: Any) -> Any:
        readers.append(BlockReader(copy.deepcopy(model), files or [], config))
        return readers[0].load_rest(model), None

    def finalize(model: Any, config: Any, info: Any) -> Any:
        info.missing_keys -= readers[0].names
        for key in readers[0].names:
            model.get_parameter_or_buffer(key)._is_hf_initialized = True
        return cls._finalize_model_loading(model, config, info)

    model = _with_hooks(cls, load, finalize).from_pretrained(name, **load_kwargs)
    model.__class__ = cls
    return model, readers[0]


def _with_hooks(cls: type, load: Any, finalize: Any) -> Any:
    """A subclass whose two steps of `from_pretrained` are replaced: reading weights, and what comes after it."""
    steps = {"_load_pretrained_model": load, "_finalize_model_loading": finalize}
    members = {key: staticmethod(step) for key, step in steps.items() if step is not None}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **members})


class BlockReader:
    """Reads the tensors of one block at a time; `reader(name)` gives {name in the block: tensor}.

    Args:
        skeleton: the model on the meta device, as transformers builds it.
        files: of the checkpoint.
        config: transformers' `LoadStateDictConfig`.

    Attributes:
        names: all tensors that it reads, by their names in the model.
    """

    def __init__(self, skeleton: PreTrainedModel, files: list[str], config: Any) -> None:
        self._skeleton, self._config = skeleton, config
        self._blocks = find_blocks(skeleton)
        block_of = _owners(skeleton, self._blocks)
        keys = {key: str(file) for file in files for key in _keys(file)}
        targets = StoredNames(skeleton, skeleton.state_dict(), keys, (), config.weight_mapping).targets
        self._files: dict[str | None, dict[str, str]] = {}  # {block, or None for the rest: {stored name: file}}
        for key, file in keys.items():
            owners = {block_of.get(target) for target in targets[key]}
            block = owners.pop() if len(owners) == 1 else None
            self._files.setdefault(block, {})[key] = file
        whole = {target for key in self._files.get(None, ()) for target in targets[key]}
        self.names = block_of.keys() - whole

    def load_rest(self, model: PreTrainedModel) -> Any:
        """Loads everything outside the blocks into a model; transformers' `LoadStateDictInfo`."""
        return self._load(model, self._files.get(None, {}))

    def __call__(self, name: str) -> Tensors:
        """
        Raises:
            ValueError: the files lack a tensor of the block, or hold it in another shape.
        """
        block = self._blocks[name]
        info = self._load(self._skeleton, self._files.get(name, {}))
        if info.mismatched_keys or info.conversion_errors:
            raise ValueError(f"{name} cannot be read: {info.mismatched_keys or info.conversion_errors}")
        found = {inner: tensor for inner, tensor in block.state_dict().items() if f"{name}.{inner}" in self.names}
        missing = [inner for inner, tensor in found.items() if tensor.is_meta]
        if missing:
            raise ValueError(f"the checkpoint lacks {name}.{missing[0]}: stream=True reads whole checkpoints only")
        block.to(device="meta")
        return found

    def _load(self, model: PreTrainedModel, keys: dict[str, str]) -> Any:
        with ExitStack() as stack, _quiet():
            readers = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(keys.values())}
            pieces = {key: readers[file].get_slice(key) for key, file in keys.items()}
            return convert_and_load_state_dict_in_model(model, pieces, self._config)[0]


def _owners(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, str]:
    """{name of a tensor: its block}, of tensors that no other part of the model shares."""
    shared = shared_tensors(model)
    return {
        f"{name}.{inner}": name
        for name, block in blocks.items()
        for inner, tensor in block.state_dict(keep_vars=True).items()
        if id(tensor) not in shared and isinstance(tensor, torch.Tensor)
    }


def _keys(file: str) -> list[str]:
    with safe_open(file, framework="pt") as reader:
        return list(reader.keys())


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers shows no progress bar: there would be one a block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
