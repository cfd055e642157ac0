"""Walks over modules and their tensors."""

import copy
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts every module into eval mode inside the block, and back into its own mode after it."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def restored_on_error(model: nn.Module, *others: Any) -> Iterator[None]:
    """An exception inside, an interrupt included, leaves a model as it was: modules, tensors, flags, hooks, attributes.

    It keeps references to all tensors, not copies: work inside may replace `tensor.data`, but not write into it.

    Args:
        others: objects whose attributes are put back too, such as the model's config.
    """
    containers = [pair for item in (*model.modules(), *others) for pair in _containers(item)]
    tensors = [(tensor, tensor.data, tensor.requires_grad, tensor.grad) for _, tensor in named_tensors(model)]
    try:
        yield
    except BaseException:
        for container, contents in containers:
            container.clear()
            container.extend(contents) if isinstance(container, list) else container.update(contents)
        for tensor, data, flag, grad in tensors:
            tensor.data, tensor.grad = data, None
            tensor.requires_grad_(flag)
            tensor.grad = grad
        raise


def _containers(item: Any) -> list[tuple[Any, Any]]:
    """An object's attributes, and the containers among them, which may be edited in place; each with a copy."""
    inner = [value for value in vars(item).values() if isinstance(value, dict | list | set)]
    return [(container, copy.copy(container)) for container in (vars(item), *inner)]


def move_to_device(values: Any, device: torch.device) -> Any:
    """Nested containers with every tensor in them on a device. One that is there several times is moved once."""
    moved: dict[int, torch.Tensor] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]

    return tree_map(move, values)


def named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's parameters and buffers."""
    return [*module.named_parameters(), *module.named_buffers()]


def tensor_place(module: nn.Module, name: str) -> tuple[dict[str, Any], str, torch.Tensor]:
    """The dict that holds a parameter or buffer of this dotted name, its key there, and the tensor."""
    parent, _, key = name.rpartition(".")
    owner = module.get_submodule(parent)
    container: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
    return container, key, container[key]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another one, wherever that is in the model."""
    for place, part in list(model.named_modules(remove_duplicate=False)):
        if part is old:
            model.set_submodule(place, new)


def tensor_bytes(module: nn.Module, without: Set[int] = frozenset()) -> int:
    """Bytes of a module's parameters and buffers as they are stored, tied ones once.

    Args:
        without: ids of tensors that do not count.
    """
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for key, tensor in tensors.items() if key not in without)


def check_device(device: Any, field: str = "device") -> None:
    """Checks that work can be done on a device; None is left to be chosen.

    Raises:
        ValueError: naming the field; an unknown device, "meta", or one that this machine lacks.
    """
    if device is None:
        return
    try:
        if torch.empty(1, device=device).is_meta:
            raise ValueError(f"{field}={device!r}: expected a device that holds data")
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{field}={device!r}: cannot be used here ({reason})") from error


def detached_states(module: nn.Module) -> dict[int, torch.Tensor]:
    """Copies of the tensors that modules hold from an earlier pass with gradients: a memo for `copy.deepcopy`.

    Such tensors, as states of recurrent layers, are no leaves of a graph, and cannot be copied as they are.
    """
    values = (value for part in module.modules() for value in vars(part).values())
    return {
        id(value): value.detach().clone() for value in values if isinstance(value, torch.Tensor) and not value.is_leaf
    }
