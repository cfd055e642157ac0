"""Calls through C of one layer alone, whose factors may be given with the call, and of the gradient of its input."""

from collections.abc import Callable

import torch

from ..packed_weight import PackedWeight
from . import PARTS, Call, FastCall, not_ready, updated

MOST_PREPARED = 16  # times that calls are made ready for C: weights that move with every call stay with Python

Product = Callable[[torch.Tensor, PackedWeight, str], torch.Tensor]  # of a tensor and a weight, by a kernel


class LayerCalls:
    """What a layer keeps where its output is differentiated, or its factors come with the call.

    Attributes:
        product: x (..., in) to (..., out).
        gradient: of x from that of the output, (..., out) to (..., in).
    """

    def __init__(self) -> None:
        self.product, self.gradient = _LoneCall(False), _LoneCall(True)


class _LoneCall:
    def __init__(self, gradient: bool) -> None:
        self._gradient, self._prepared = gradient, 0
        self._fast: FastCall | None = None
        self._call: Call = not_ready

    def __call__(self, x: torch.Tensor, weight: PackedWeight, kernel: str, otherwise: Product) -> torch.Tensor:
        """By C, or else by a function of the same arguments, whose kernels C takes over.

        Args:
            x: as autocast wants it, like the weight.
        """
        parameters = dict(zip(PARTS, weight, strict=False))
        out = self._call(parameters, x, kernel)
        if out is not None:
            return out
        out = otherwise(x, weight, kernel)
        if self._prepared < MOST_PREPARED:
            fast = updated(self._fast, (weight,), (parameters,), kernel, x, self._gradient, is_cast=True)
            if fast is not None and fast is not self._fast:
                self._fast, self._call, self._prepared = fast, fast.call, self._prepared + 1
        return out
