"""How S x + B A x is computed. One entry point; callers never choose a kernel themselves."""

from .reference import sparse_linear

__all__ = ["sparse_linear"]
