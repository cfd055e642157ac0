"""How S x + B A x is computed. Callers never choose a kernel themselves."""

from .dispatch import KERNELS, packed_linear, packed_linears
from .exportable import exportable_linear
from .packed_weight import PackedWeight
from .reference import sparse_linear

__all__ = ["KERNELS", "PackedWeight", "exportable_linear", "packed_linear", "packed_linears", "sparse_linear"]
