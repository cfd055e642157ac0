"""How S x + B A x is computed. One entry point; callers never choose a kernel themselves."""

from .dispatch import packed_linear
from .ops import KERNELS
from .reference import sparse_linear

__all__ = ["KERNELS", "packed_linear", "sparse_linear"]
