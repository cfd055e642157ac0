"""The experts of a mixture as 2-D linear layers, in the place of one 3-D parameter.

transformers holds the weights of all experts of a block in parameters such as `gate_up_proj` (experts, out, in). The
module takes `self.gate_up_proj[expert]` for a product, or transformers takes the whole parameter for a grouped one.
Here an `ExpertStack` takes the parameter's place. Its entries are linear layers, dense or packed, and the product of an
entry is the layer's own. So the module's own code, with all its biases, gates and scalings, runs unchanged, and so do
transformers' implementations "grouped_mm" and "batched_mm". In these two, packed experts on a GPU take one launch.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels import PackedWeight
from ..kernels.experts import expert_table
from ..kernels.override import chosen_kernel
from .linear import SparseLRLinear

if TYPE_CHECKING:
    from ..kernels.cuda.experts import ExpertTable

_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_PRODUCTS = "they take part in products x W only, of single experts, selected or grouped"
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

    def __getitem__(self, expert: int | torch.Tensor) -> "ExpertWeight | SelectedWeights":
        """The weight of one expert for products with it, or those that an index (rows,) selects for a batch."""
        if isinstance(expert, torch.Tensor) and expert.ndim == 1:
            return SelectedWeights(self, expert)
        return ExpertWeight(self._modules[str(int(expert))])

    def view(self, *shape: Any) -> "ExpertStack":
        """The stack itself, if the parameter it stands for would become (experts, a, b)."""
        sizes = tuple(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if len(sizes) != 3 or any(size not in (-1, own) for size, own in zip(sizes, self.shape, strict=True)):
            raise TypeError(f"packed experts {tuple(self.shape)} cannot be viewed as {sizes}")
        return self

    def transpose(self, *dims: int) -> "ExpertStack":
        """The stack itself: in whichever order a parameter holds weights, the product is that of the layers."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, ends = getattr(func, "__name__", str(func)), (kwargs or {}).get("offs")
        if len(args) > 1 and isinstance(args[1], cls):
            inputs, stack = args[:2]
            if name in _GROUPED and ends is not None:
                return stack.multiply(inputs, ends)
            if name == "bmm":  # (experts, rows, in)
                ends = torch.arange(1, len(stack) + 1, dtype=torch.int32, device=inputs.device) * inputs.shape[1]
                return stack.multiply(inputs.flatten(0, 1), ends).unflatten(0, inputs.shape[:2])
        raise TypeError(f"{name} of packed experts: {_PRODUCTS}")

    def multiply(self, inputs: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The products of all experts with their rows.

        Args:
            inputs: (rows, in), in the order of the experts.
            ends: integer (experts,), for each expert the first row after its own. Rows after the last give zeros, or
                anything on a GPU.

        Returns:
            (rows, out).
        """
        table = self.table(inputs) if len(inputs) else None
        if table is not None and inputs.shape[1] == table.ins and table.takes(len(inputs)):
            with torch.cuda.device_of(inputs):
                return table.grouped(inputs, ends.to(torch.int32).contiguous())
        parts, start = [], 0
        for layer, end in zip(self, ends.tolist(), strict=True):
            if end > start:
                parts.append(layer(inputs[start:end]))
                start = end
        if start < len(inputs) or not parts:
            like = parts[0] if parts else self._modules["0"](inputs[:0])
            parts.append(like.new_zeros(len(inputs) - start, like.shape[1]))
        return torch.cat(parts)

    def select(self, inputs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The product of every row with the weight of an expert.

        Args:
            inputs: (rows, in).
            experts: int64 (rows,), the expert of each row.

        Returns:
            (rows, out).
        """
        ordered, order = torch.sort(experts)
        ends = torch.searchsorted(ordered, torch.arange(len(self), device=ordered.device), right=True, out_int32=True)
        out = self.multiply(inputs[order], ends)
        return torch.empty_like(out).index_copy(0, order, out)

    def table(self, inputs: torch.Tensor) -> "ExpertTable | None":
        """The kernels that compute all experts of these inputs in one launch, if there are any.

        None too where a call of a layer is more than its product: with adapters, hooks, a hierarchical part.
        """
        if not inputs.is_cuda or torch.compiler.is_compiling():
            return None
        known = _KNOWN.get(self)
        if known is None or known.layers != tuple(self._modules.values()):
            known = _KNOWN[self] = Known(self)
        return known.table(inputs)

    @property
    def dtype(self) -> torch.dtype:
        return _reference(self._modules["0"]).dtype

    @property
    def device(self) -> torch.device:
        return _reference(self._modules["0"]).device

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}"


class Known:
    """What is asked of a stack's layers in every call, at hand: nn.Module answers slowly.

    Attributes:
        layers: of the stack when this was made.
    """

    def __init__(self, stack: ExpertStack) -> None:
        self.layers = tuple(stack._modules.values())
        self._are_packed = all(type(layer) is SparseLRLinear for layer in self.layers)
        self._parameters = [layer._parameters for layer in self.layers]
        self._states = [vars(layer) for layer in self.layers]
        # Not empty where a call is more than the product: hooks, or a module of a hierarchical part.
        self._more = [
            more
            for layer in self.layers
            for more in (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks, layer._modules)
        ]
        names = ("mask", "values", "A", "B", "bias")
        present = [name for name in names if self._are_packed and self._parameters[0].get(name) is not None]
        self._tensors, self._each = itemgetter(*present) if len(present) > 1 else None, len(present)

    def table(self, inputs: torch.Tensor) -> "ExpertTable | None":
        if self._tensors is None or any(self._more) or any(map(contains, self._states, repeat("forward"))):
            return None
        if chosen_kernel(self.layers[0].kernel) == "dense":
            return None
        try:
            tensors = list(chain.from_iterable(map(self._tensors, self._parameters)))
        except KeyError:  # the copies of DataParallel have no parameters
            return None
        return expert_table(inputs, tensors, tensors[:: self._each], self._weights)

    def _weights(self) -> list[PackedWeight]:
        return [layer.packed_weight for layer in self.layers]


_KNOWN: "WeakKeyDictionary[ExpertStack, Known]" = WeakKeyDictionary()


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

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") != "bmm" or len(args) < 2 or not isinstance(args[1], cls):
            raise TypeError(f"{getattr(func, '__name__', func)} of the weights of experts is no product x W")
        args[1].uses.add(True)
        return torch.bmm(args[0], args[1].weights.to(args[0].dtype))


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

    float = to

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
        """Itself: the layer computes in its own dtype, on its own device. The product has the dtype of the input."""
        return self

    float = to

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """(rows, in) to (rows, out), in the dtype of the inputs."""
        dtype = _reference(self.layer).dtype
        return self.layer(inputs) if inputs.dtype == dtype else self.layer(inputs.to(dtype)).to(inputs.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], cls):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            product = args[1].multiply(args[0])
            return product if bias is None else product + bias
        if func in _MATMULS and isinstance(args[1], cls) and not isinstance(args[0], cls):
            return args[1].multiply(args[0])
        raise TypeError(f"{getattr(func, '__name__', func)} of a packed expert: {_PRODUCTS}")


class SelectedWeights:
    """Weights of experts, one for each row of a batch: `stack[ids]`."""

    def __init__(self, stack: ExpertStack, experts: torch.Tensor) -> None:
        self.stack, self.experts = stack, experts

    def transpose(self, *dims: int) -> "SelectedWeights":
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`bmm` of (rows, 1, in) and the weights, or of the weights and (rows, in, 1)."""
        left, right = args[:2] if len(args) > 1 else (None, None)
        if getattr(func, "__name__", "") == "bmm" and isinstance(right, cls) and left.shape[1] == 1:
            return right.stack.select(left[:, 0], right.experts)[:, None]
        if getattr(func, "__name__", "") == "bmm" and isinstance(left, cls) and right.shape[2] == 1:
            return left.stack.select(right[:, :, 0], left.experts)[:, :, None]
        raise TypeError(f"{getattr(func, '__name__', func)} of packed experts: {_PRODUCTS}")


IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")  # of experts, that form products x W with the stacks
