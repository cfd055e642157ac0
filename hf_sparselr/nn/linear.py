"""SparseLRLinear: a linear layer whose weight is a packed S plus low-rank factors."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ..format.bitmask import pack, unpack
from ..format.decomposition import Decomposition
from ..kernels import PackedWeight, exportable_linear, packed_linear
from ..kernels.fast_calls import Call, FastCall, not_ready, updated
from ..kernels.fast_calls.layer_calls import MOST_PREPARED, LayerCalls
from .hierarchical import HierarchicalLowRank
from .lazy_weight import LazyDenseWeight

_PARTS = itemgetter("mask", "values", "A", "B", "bias")
_OF_THIS_RUN = ("fast_call", "fast_call_alone", "_fast", "_prepared", "_calls")
_NOT_ASSIGNED = (
    "the weight S + B A of a compressed layer is computed and cannot be assigned: assign or train its values, A and B, "
    "or make the model dense first (model.dequantize(), or layer.to_dense())"
)


class SparseLRLinear(nn.Linear):
    """y = x S^T + (x A^T) B^T + bias, computed from the packed S.

    A subclass of `nn.Linear`, so that code that looks for linear layers finds it, but without a weight
    parameter: `weight` is a property whose values are built when they are read (see `LazyDenseWeight`).

    Attributes:
        mask: uint8 (out, ceil(in / 8)), `values`: (nonzeros,): the packed S (see `format.bitmask`).
        A: (rank, in), B: (out, rank), or None at rank 0.
        bias: (out,) or None.
        hierarchy: a hierarchical low-rank part beside B A, or None.
        transposed: the layer it replaced was a transformers Conv1D, whose weight is (in, out).
        kernel: how the product is computed, "auto", "packed" or "dense" (see `kernels.packed_linear`).
        shared_input: computes the layer together with those that share its input, among which it has a `number` (see
            `shared_input.SharedInputGroup`), or None.
    """

    A: nn.Parameter | None
    B: nn.Parameter | None
    kernel = "auto"
    shared_input: Callable[["SparseLRLinear", torch.Tensor], torch.Tensor] | None = None
    number = 0
    # Computes the layer by C, as far as calls have shown how, or answers None; alone, where a group cannot.
    fast_call: Call = staticmethod(not_ready)
    fast_call_alone: Call = staticmethod(not_ready)
    _fast: FastCall | None = None
    _prepared = 0
    _calls: LayerCalls | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzeros: int,
        rank: int,
        bias: bool = False,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed

        def frozen(*shape: int, dtype: torch.dtype | None = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        # Parameters, not buffers: accelerate does not offload buffers by default.
        self.mask = frozen(out_features, -(-in_features // 8), dtype=torch.uint8)
        self.values = frozen(nonzeros)
        self.register_parameter("A", frozen(rank, in_features) if rank else None)
        self.register_parameter("B", frozen(out_features, rank) if rank else None)
        self.register_parameter("bias", frozen(out_features) if bias else None)
        self.hierarchy: HierarchicalLowRank | None = None  # set where the layer has one
        self._is_hf_initialized = True  # transformers must not draw a random weight for it

    @classmethod
    def from_decomposition(
        cls,
        decomposition: Decomposition,
        bias: torch.Tensor | None = None,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "SparseLRLinear":
        """Packs S (out, in), its support, A and B, in `dtype` (default: the dtype of S)."""
        S, mask = decomposition.S, decomposition.mask
        dtype = dtype or S.dtype
        packed, values = pack(S, mask)
        rank = 0 if decomposition.A is None else decomposition.A.shape[0]
        layer = cls(S.shape[1], S.shape[0], len(values), rank, bias is not None, transposed, S.device, dtype)
        layer.mask.data = packed
        layer.values.data = values.to(dtype)
        if rank:
            layer.A.data = decomposition.A.to(dtype)
            layer.B.data = decomposition.B.to(dtype)
        if bias is not None:
            layer.bias.data = bias.detach().to(dtype)
        if decomposition.hierarchy is not None:
            layer.hierarchy = HierarchicalLowRank.from_hierarchy(decomposition.hierarchy, dtype)
        return layer

    @property
    def packed_weight(self) -> PackedWeight:
        """S + B A and the bias, as the kernels take them."""
        if not torch.compiler.is_compiling():
            try:
                # Ten times as fast as a Module's attributes.
                return PackedWeight(*_PARTS(self._parameters), self.in_features)
            except KeyError:  # the copies of DataParallel have no parameters
                pass
        return PackedWeight(self.mask, self.values, self.A, self.B, self.bias, self.in_features)

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @property
    def factors(self) -> list[nn.Parameter]:
        """A and B, and the tensors of the hierarchical part that train."""
        flat = [] if self.A is None else [self.A, self.B]
        return flat if self.hierarchy is None else flat + self.hierarchy.factors

    @property
    def weight(self) -> torch.Tensor:
        """S + B A, (out, in), or (in, out) where the layer replaced a Conv1D. Built when its values are read."""
        if torch.compiler.is_compiling():  # the compiler cannot make the view, and drops unused tensors
            return self._dense()
        shape = (self.out_features, self.in_features)
        view = LazyDenseWeight(shape[::-1] if self.transposed else shape, self.values, self._dense)
        view._is_hf_initialized = True
        return view

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        # PEFT gives an unloaded layer its own weight back; nothing else may be assigned.
        if getattr(value, "build", None) != self._dense:
            raise AttributeError(_NOT_ASSIGNED)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # A Parameter that is assigned comes here, and never to the setter.
        if name == "weight":
            raise AttributeError(_NOT_ASSIGNED)
        super().register_parameter(name, param)

    def _dense(self) -> torch.Tensor:
        dense = unpack(self.mask, self.values, self.in_features)
        if self.rank:
            dense = dense + self.B @ self.A
        if self.hierarchy is not None:
            dense = dense + self.hierarchy.dense()
        return dense.T.contiguous() if self.transposed else dense

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    compute_dtype = dtype  # PEFT's name for it

    def forward(
        self, inputs: torch.Tensor, factors: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
    ) -> torch.Tensor:
        """x: (..., in) to (..., out); `factors`, (A, B) or (None, None), stand in for the layer's own."""
        hierarchy, differentiates = self.hierarchy, torch.is_grad_enabled()
        if factors is None and not differentiates and not torch.compiler.is_compiling():
            out = None
            if inputs.is_inference():  # no group serves these, and it would take an error to find out
                out = self.fast_call_alone(self._parameters, inputs, self.kernel)
            if out is None:
                out = self.fast_call(self._parameters, inputs, self.kernel)
            if out is not None:
                return out if hierarchy is None else hierarchy(inputs, out)
        if hierarchy is not None and factors is None and self._is_hierarchy_alone:
            return hierarchy(inputs)
        if factors is not None:
            A, B = factors
            out = _multiply(inputs, self.packed_weight._replace(A=A, B=B), self.kernel, self._called())
        elif differentiates:
            out = _multiply(inputs, self.packed_weight, self.kernel, self._called())
        elif _is_exported():
            out = self.product(inputs)
        elif self.shared_input is None:
            out = self.product(inputs)
            self.prepare(inputs)
        else:
            out = self.shared_input(self, inputs)
        return out if hierarchy is None else hierarchy(inputs, out)

    @property
    def _is_hierarchy_alone(self) -> bool:
        """Whether S is empty, and nothing else stands beside a hierarchical part."""
        return self.A is None and self.bias is None and not self.values.numel()

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """`forward` of this layer alone, without the hierarchical part."""
        return _multiply(inputs, self.packed_weight, self.kernel)

    def _called(self) -> LayerCalls | None:
        """What it keeps for calls whose output is differentiated, or which bring factors."""
        if torch.compiler.is_compiling():
            return None
        if self._calls is None:
            self._calls = LayerCalls()
        return self._calls

    def prepare(self, inputs: torch.Tensor, alone: bool = False) -> None:
        """Lets C take the next such calls, after `product` of these inputs.

        Args:
            alone: only where the layers with the same input cannot be computed together.
        """
        if torch.compiler.is_compiling() or self._prepared > MOST_PREPARED or not self._parameters:
            return
        fast = updated(self._fast, (self.packed_weight,), (self._parameters,), self.kernel, inputs)
        if fast is not None and fast is not self._fast:
            self._fast, self._prepared = fast, self._prepared + 1
            if alone:
                self.fast_call_alone = fast.call
            else:
                self.fast_call = fast.call

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process and these parameters."""
        return {name: value for name, value in self.__dict__.items() if name not in _OF_THIS_RUN}

    def to_dense(self) -> nn.Module:
        """The layer it replaced, with S + B A as its weight."""
        from transformers.pytorch_utils import Conv1D

        weight = self._dense()
        with torch.device("meta"):
            if self.transposed:
                layer = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.data, requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        kept = self.values.numel() / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"sparsity={1 - kept:.4g}, rank={self.rank}, bias={self.bias is not None}"
        )


def _multiply(inputs: torch.Tensor, weight: PackedWeight, kernel: str, calls: LayerCalls | None = None) -> torch.Tensor:
    if _is_exported():
        return exportable_linear(inputs, weight)
    return packed_linear(inputs, weight, kernel, calls)


def _is_exported() -> bool:
    """To ONNX, by torch.export; asked only there, as the question takes longer than the rest of a call."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def packed_layers(model: nn.Module) -> dict[str, SparseLRLinear]:
    """All packed layers of a model: {dotted name: layer}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLRLinear)}
