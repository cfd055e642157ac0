"""How S x + B A x is computed. Callers never choose a kernel themselves."""

from .dispatch import packed_linear, packed_linears
from .ops import KERNELS
from .reference import sparse_linear

__all__ = ["KERNELS", "packed_linear", "packed_linears", "sparse_linear"]
