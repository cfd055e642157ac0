"""Experts: 3-D parameters become stacks of 2-D linear layers before the block loop, which then knows no experts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..nn.packed_experts import IMPLEMENTATIONS, ExpertStack
from .convolutions import convolutions_as_layers
from .model_structure import find_blocks, linear_layers


def expert_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str, int]]:
    """The parameters inside the blocks that hold the weights of experts: {dotted name: (module, name in it, experts)}.

    A module tells by an attribute such as `num_experts` how many it has. Its weights are parameters (experts, a, b), or
    (experts * a, b).
    """
    found = {}
    for block_name, block in find_blocks(model).items():
        for name, module in block.named_modules(prefix=block_name):
            found |= {f"{name}.{key}": (module, key, count) for key, count in weights_of_experts(module).items()}
    return found


def weights_of_experts(module: nn.Module) -> dict[str, int]:
    """The parameters of a module that hold the weights of experts: {name: number of experts}."""
    counts = {value for key, value in vars(module).items() if "experts" in key and type(value) is int and value > 1}
    fitting = (
        (key, count)
        for key, parameter in module.named_parameters(recurse=False)
        for count in counts
        if _holds(parameter, count)
    )
    return dict(fitting)


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

    Raises:
        ValueError: the model runs its experts by an implementation that needs the parameters.
    """
    wanted, transposed = {name.rpartition(".")[0] for name in names}, set(transposed)
    for name, (module, key, experts) in expert_parameters(model).items():
        if name in wanted:
            check_implementation(module)
            unfuse(module, key, experts, name in transposed)


def unfuse(module: nn.Module, key: str, experts: int, transposed: bool = False) -> None:
    """Puts an `ExpertStack` in the place of a parameter of a module. It shares the weights."""
    parameter = getattr(module, key)
    turned = getattr(module, "is_transposed", False) or transposed
    layers, shape = _layers(parameter, experts, turned), stack_shape(parameter, experts)
    delattr(module, key)
    setattr(module, key, ExpertStack(layers, shape, parameter.ndim == 2, turned))


def check_implementation(module: nn.Module) -> None:
    """That a module runs its experts in a way that packed experts can take part in.

    Raises:
        ValueError: it does not.
    """
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if chosen not in IMPLEMENTATIONS:
        allowed = " or ".join(f'"{name}"' for name in IMPLEMENTATIONS if name)
        raise ValueError(f'experts_implementation="{chosen}": packed experts run by {allowed}')


@contextmanager
def one_expert_at_a_time(model: nn.Module) -> Iterator[None]:
    """Inside, the modules with stacks run their own loops over experts, which need the least memory."""
    configs = {}
    for module in model.modules():
        if any(isinstance(child, ExpertStack) for child in module.children()):
            config = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation_internal"):
                configs[id(config)] = config
    chosen = {key: config._experts_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = chosen[key]


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
