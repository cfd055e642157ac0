"""The experts of a mixture as 2-D linear layers, in the place of one 3-D parameter.

transformers holds the weights of all experts of a block in parameters such as `gate_up_proj` (experts, out, in). The
module takes `self.gate_up_proj[expert]` for a product. Here an `ExpertStack` takes the parameter's place. Its entries
are linear layers, dense or packed, and the product of an entry is the layer's own. So the module's own code, with all
its biases, gates and scalings, runs unchanged.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_MATMULS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


class ExpertStack(nn.Module):
    """The linear layers of all experts, in the place of a parameter (experts, a, b).

    Args:
        layers: one an expert, of equal shapes.
        shape: of the parameter.
        flat: the parameter is (experts * a, b), which the module views as (experts, a, b).
        transposed: it holds weights as (in, out).
    """

    def __init__(
        self, layers: Iterable[nn.Module], shape: tuple[int, int, int], flat: bool = False, transposed: bool = False
    ) -> None:
        super().__init__()
        for expert, layer in enumerate(layers):
            self.add_module(str(expert), layer)
        self.shape = torch.Size(shape)
        self.flat, self.transposed = flat, transposed

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def __getitem__(self, expert: int | torch.Tensor) -> "ExpertWeight":
        """The weight of one expert, for a product with it."""
        return ExpertWeight(self._modules[str(int(expert))])

    def view(self, *shape: Any) -> "ExpertStack":
        """The stack itself, if the parameter it stands for would become (experts, a, b)."""
        sizes = tuple(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if len(sizes) != 3 or any(size not in (-1, own) for size, own in zip(sizes, self.shape, strict=True)):
            raise TypeError(f"packed experts {tuple(self.shape)} cannot be viewed as {sizes}")
        return self

    @property
    def dtype(self) -> torch.dtype:
        return _reference(self._modules["0"]).dtype

    @property
    def device(self) -> torch.device:
        return _reference(self._modules["0"]).device

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}"


def _reference(layer: nn.Module) -> torch.Tensor:
    return next(tensor for tensor in layer.parameters() if tensor.is_floating_point())


class WatchedStack:
    """Replaces a parameter of dense experts during one forward pass, and notes whether the pass forms x W or x W^T.

    Attributes:
        uses: True for x W, False for x W^T.
    """

    def __init__(self, parameter: torch.Tensor, shape: tuple[int, int, int]) -> None:
        self.weights = parameter.detach().view(shape)
        self.shape, self.dtype, self.device = self.weights.shape, parameter.dtype, parameter.device
        self.uses: set[bool] = set()

    def view(self, *shape: Any) -> "WatchedStack":
        return self

    def __getitem__(self, expert: int | torch.Tensor) -> "WatchedWeight":
        return WatchedWeight(self, self.weights[int(expert)], False)


class WatchedWeight:
    """One weight of a `WatchedStack`; `transposed`: an odd number of times."""

    def __init__(self, stack: WatchedStack, weight: torch.Tensor, transposed: bool) -> None:
        self.stack, self.weight, self.transposed = stack, weight, transposed

    @property
    def T(self) -> "WatchedWeight":  # noqa: N802 (the name of a tensor's property)
        return WatchedWeight(self.stack, self.weight.T, not self.transposed)

    def t(self) -> "WatchedWeight":
        return self.T

    def transpose(self, *dims: int) -> "WatchedWeight":
        return self.T

    def to(self, *args: Any, **kwargs: Any) -> "WatchedWeight":
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_linear = func is F.linear
        if not (is_linear or func in _MATMULS) or len(args) < 2 or not isinstance(args[1], cls):
            raise TypeError(f"{getattr(func, '__name__', func)} of an expert's weight is no product x W")
        weight = args[1]
        weight.stack.uses.add(weight.transposed if is_linear else not weight.transposed)
        return func(args[0], weight.weight.to(args[0].dtype), *args[2:], **(kwargs or {}))


class ExpertWeight:
    """An expert's weight in a product x W^T or x W, which its layer computes.

    Whether a module stores weights as (out, in) or (in, out), the product that it forms with them is that of the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @property
    def T(self) -> "ExpertWeight":  # noqa: N802 (the name of a tensor's property)
        return self

    def t(self) -> "ExpertWeight":
        return self

    def transpose(self, *dims: int) -> "ExpertWeight":
        return self

    def to(self, *args: Any, **kwargs: Any) -> "ExpertWeight":
        """Itself: the layer computes in the dtype of its input, on its own device."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], cls):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            product = args[1].layer(args[0])
            return product if bias is None else product + bias
        if func in _MATMULS and isinstance(args[1], cls) and not isinstance(args[0], cls):
            return args[1].layer(args[0])
        raise TypeError(
            f"{getattr(func, '__name__', func)} of an expert's weight: packed experts take part in products x W only"
        )


def run_eagerly(experts: nn.Module) -> None:
    """Lets an experts module run its own loop: other implementations need the 3-D parameters."""
    config = getattr(experts, "config", None)
    if getattr(config, "_experts_implementation", "eager") != "eager":
        experts.config = copy.copy(config)
        experts.config._experts_implementation = "eager"
