"""Experts: 3-D parameters become stacks of 2-D linear layers before the block loop, which then knows no experts."""

from collections.abc import Iterable

import torch
from torch import nn

from ..nn.packed_experts import ExpertStack, run_eagerly
from .convolutions import convolutions_as_layers
from .model_structure import find_stacks, linear_layers


def expert_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str, int]]:
    """The parameters inside the blocks that hold the weights of experts: {dotted name: (module, name in it, experts)}.

    A module tells by an attribute such as `num_experts` how many it has. Its weights are parameters (experts, a, b), or
    (experts * a, b).
    """
    found = {}
    for blocks in find_stacks(model).values():
        for block_name, block in blocks.items():
            for name, module in block.named_modules(prefix=block_name):
                counts = {
                    value
                    for key, value in vars(module).items()
                    if "experts" in key and type(value) is int and value > 1
                }
                for key, parameter in module.named_parameters(recurse=False):
                    count = next((count for count in counts if _holds(parameter, count)), None)
                    if count is not None:
                        found[f"{name}.{key}"] = (module, key, count)
    return found


def _holds(parameter: nn.Parameter, experts: int) -> bool:
    """Whether a parameter has the shape of weights of this number of experts: not that of biases, or of a router."""
    if parameter.ndim == 3:
        return len(parameter) == experts and min(parameter.shape[1:]) > 1
    return parameter.ndim == 2 and len(parameter) % experts == 0 and len(parameter) > 8 * experts


def compressible_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside the blocks, and those that experts and convolutions would become: {dotted name: layer}.

    The latter are new modules that share the model's weights.
    """
    layers = {**linear_layers(model), **convolutions_as_layers(model)}
    for name, (module, key, experts) in expert_parameters(model).items():
        transposed = getattr(module, "is_transposed", False)
        views = _layers(getattr(module, key), experts, transposed)
        layers |= {f"{name}.{expert}": layer for expert, layer in enumerate(views)}
    return layers


def unfuse_experts(model: nn.Module, names: Iterable[str], transposed: Iterable[str] = ()) -> None:
    """Puts an `ExpertStack` in the place of every parameter that holds one of the named layers. It shares the weights.

    Args:
        transposed: the parameters that hold weights as (in, out), beside those whose module says so.
    """
    wanted, transposed = {name.rpartition(".")[0] for name in names}, set(transposed)
    for name, (module, key, experts) in expert_parameters(model).items():
        if name in wanted:
            parameter = getattr(module, key)
            turned = getattr(module, "is_transposed", False) or name in transposed
            layers = _layers(parameter, experts, turned)
            delattr(module, key)
            shape = stack_shape(parameter, experts)
            setattr(module, key, ExpertStack(layers, shape, parameter.ndim == 2, turned))
            run_eagerly(module)


def stack_shape(parameter: nn.Parameter, experts: int) -> tuple[int, int, int]:
    """(experts, a, b) of a parameter with the weights of experts."""
    width = parameter.shape[-1]
    return experts, parameter.numel() // experts // width, width


def expert_weights(parameter: torch.Tensor, stack: ExpertStack) -> list[torch.Tensor]:
    """The weights (out, in) of the layers of a dense stack: views of the parameter that it stands for."""
    weights = parameter.detach().view(stack.shape)
    return list(weights.transpose(1, 2) if stack.transposed else weights)


def fused_weights(tensors: dict[str, torch.Tensor], name: str, module: nn.Module, shape: torch.Size) -> torch.Tensor:
    """The parameter of a module, from the weights `name.0.weight`, ... of the layers that stood for it."""
    weights = torch.stack(
        [tensors[f"{name}.{n}.weight"] for n in range(len(tensors)) if f"{name}.{n}.weight" in tensors]
    )
    if weights.shape[2] != shape[-1] or getattr(module, "is_transposed", False):
        weights = weights.transpose(1, 2)
    return weights.reshape(shape)


def _layers(parameter: nn.Parameter, experts: int, transposed: bool) -> list[nn.Module]:
    """Linear layers whose weights (out, in) are views of a parameter."""
    weights = parameter.detach().view(stack_shape(parameter, experts))
    layers = []
    for weight in weights.transpose(1, 2) if transposed else weights:
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        layers.append(layer)
    return layers


def fuse_experts(model: nn.Module) -> None:
    """Puts parameters in the place of the stacks whose layers are all dense again."""
    for module in list(model.modules()):
        for key, stack in list(module.named_children()):
            if isinstance(stack, ExpertStack) and all(type(layer) is nn.Linear for layer in stack):
                weights = torch.stack([layer.weight.detach() for layer in stack])
                if stack.transposed:
                    weights = weights.transpose(1, 2)
                flags = [layer.weight.requires_grad for layer in stack]
                delattr(module, key)
                shape = (-1, stack.shape[-1]) if stack.flat else stack.shape
                setattr(module, key, nn.Parameter(weights.reshape(shape), requires_grad=all(flags)))
