"""Packed problems with their float64 answers, for the tests of the kernels."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hf_sparselr.format.bitmask import pack
from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.format.patterns import parse
from hf_sparselr.kernels import PackedWeight
from hf_sparselr.nn.linear import SparseLRLinear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

# (out, in, sparsity or support): odd sizes, exact and inexact N:M, extreme supports
SUPPORTS = [
    (9, 100, 0.5), (1, 64, 0.7), (5, 3, 0.5), (7, 130, 0.9), (6, 257, 0.6), (16, 256, "2:4"), (5, 320, "2:4"),
    (4, 100, "2:4"), (6, 192, "4:8"), (6, 128, "1:4"), (4, 96, "empty"), (3, 70, "full"), (5, 128, "empty rows"),
    (2, 576, "short groups"),
]  # fmt: skip


@dataclass
class Problem:
    """S + B A packed, and as float64 `dense`."""

    mask: torch.Tensor
    values: torch.Tensor
    A: torch.Tensor | None
    B: torch.Tensor | None
    bias: torch.Tensor | None
    S: torch.Tensor
    support: torch.Tensor

    @property
    def dense(self) -> torch.Tensor:
        return self.S if self.A is None else self.S + self.B.double() @ self.A.double()

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.double(), self.dense, None if self.bias is None else self.bias.double())

    @property
    def weight(self) -> PackedWeight:
        parts = self.mask, self.values, self.A, self.B, self.bias
        return PackedWeight(*parts, self.support.shape[1])


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def choose_support(out: int, n: int, kind: str | float) -> torch.Tensor:
    scores = draw(out, n, seed=1).abs()
    if isinstance(kind, float) or ":" in kind:
        return parse(kind).mask(scores)
    if kind == "short groups":  # 2:4 with a group that keeps one: its values are not where exact 2:4 has them
        support = parse("2:4").mask(scores)
        support[0, :4] = torch.tensor([True, False, False, False])
        return support
    support = torch.full((out, n), kind != "empty", device=DEVICE)
    if kind == "empty rows":
        support[1] = support[-1] = False
    return support


def problem(
    out: int, n: int, kind: str | float, rank: int = 3, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Problem:
    support = choose_support(out, n, kind)
    S = draw(out, n, seed=2, dtype=dtype) * support
    mask, values = pack(S, support)
    A = draw(rank, n, seed=3, dtype=dtype) if rank else None
    B = draw(out, rank, seed=4, dtype=dtype) if rank else None
    return Problem(mask, values, A, B, draw(out, seed=5, dtype=dtype) if bias else None, S.double(), support)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of `dtype` of the largest entry: sums are in FP32, results rounded once."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    if actual.numel():
        scale = max(float(expected.abs().max()), 1e-30)
        assert float((actual.double() - expected).abs().max()) <= 8 * torch.finfo(dtype).eps * scale


def layer_of(case: Problem, n: int, kernel: str = "auto") -> SparseLRLinear:
    S = case.S.to(case.values.dtype)
    layer = SparseLRLinear.from_decomposition(Decomposition(S, case.support, case.A, case.B), case.bias)
    layer.kernel = kernel
    return layer
