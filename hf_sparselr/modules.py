"""SparseLRLinear: a linear layer whose weight is a packed S plus low-rank factors."""

import torch
from torch import nn
from torch.nn import functional as F

from .kernels import sparse_linear
from .packing import pack, unpack
from .solvers import Decomposition


class SparseLRLinear(nn.Linear):
    """y = x S^T + (x A^T) B^T + bias, computed from the packed S.

    A subclass of `nn.Linear`, so that code that looks for linear layers finds it, but without a weight
    parameter: `weight` is a property that builds S + B A on every read.

    Attributes:
        mask: uint8 (out, ceil(in / 8)), `values`: (nonzeros,): the packed S (see `packing`).
        A: (rank, in), B: (out, rank), or None at rank 0.
        bias: (out,) or None.
        transposed: the layer it replaced was a transformers Conv1D, whose weight is (in, out).
    """

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
        self.dtype = dtype or torch.get_default_dtype()

        def frozen(*shape: int, dtype: torch.dtype | None = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        # Parameters, not buffers: accelerate does not offload buffers by default.
        self.mask = frozen(out_features, -(-in_features // 8), dtype=torch.uint8)
        self.values = frozen(nonzeros)
        self.A = frozen(rank, in_features) if rank else None
        self.B = frozen(out_features, rank) if rank else None
        self.bias = frozen(out_features) if bias else None
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
        return layer

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """S + B A as a new dense tensor: (out, in), or (in, out) where the layer replaced a Conv1D."""
        dense = unpack(self.mask, self.values, self.in_features)
        if self.rank:
            dense = dense + self.B @ self.A
        dense = dense.T.contiguous() if self.transposed else dense
        dense._is_hf_initialized = True
        return dense

    @property
    def qweight(self) -> torch.Tensor:
        """The tensor from which PEFT takes the device; without it PEFT reads `weight`, which densifies."""
        return self.values

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.values.dtype

    def sparse_forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """x S^T + bias, without the low-rank part."""
        out = sparse_linear(inputs, self.mask, self.values, self.in_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def forward(self, inputs: torch.Tensor, low_rank: bool = True) -> torch.Tensor:
        """x: (..., in) to (..., out); `low_rank=False` leaves out A and B, for adapters that replace them."""
        out = self.sparse_forward(inputs)
        if low_rank and self.rank:
            out = out + F.linear(F.linear(inputs, self.A), self.B)
        return out

    def to_dense(self) -> nn.Module:
        """The layer it replaced, with S + B A as its weight."""
        from transformers.pytorch_utils import Conv1D

        weight = self.weight
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
