"""The weight of a packed layer as the kernels take it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch


class PackedWeight(NamedTuple):
    """S + B A and a bias, by the tensors that hold them.

    Attributes:
        mask: uint8 (out, ceil(in / 8)), see `format.bitmask`.
        values: (nonzeros,), the kept values of S, row after row.
        A, B: (rank, in) and (out, rank), or None.
        bias: (out,) or None.
        in_features: in.
    """

    mask: torch.Tensor
    values: torch.Tensor
    A: torch.Tensor | None
    B: torch.Tensor | None
    bias: torch.Tensor | None
    in_features: int

    @property
    def out_features(self) -> int:
        return self.mask.shape[0]

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """Those that are there."""
        return (tensor for tensor in self[:5] if tensor is not None)

    def to(self, dtype: torch.dtype) -> "PackedWeight":
        """With values, factors and bias in another dtype."""
        mask, *floats, in_features = self
        return PackedWeight(mask, *(t if t is None else t.to(dtype) for t in floats), in_features)

    def contiguous(self) -> "PackedWeight":
        """With every tensor contiguous; itself where they are."""
        if all(tensor.is_contiguous() for tensor in self.tensors):
            return self
        return PackedWeight(*(t if t is None else t.contiguous() for t in self[:5]), self.in_features)

    def check(self) -> None:
        """Shapes, dtypes and devices; no value is read.

        Raises:
            ValueError: a shape or a device, naming the tensor, its value and the expected one.
            TypeError: a dtype, likewise, or no mask or values at all.
        """
        mask, values, A, B, bias, in_features = self
        if mask is None or values is None:
            raise TypeError(f"{'mask' if mask is None else 'values'} is None, expected a tensor")
        if (A is None) != (B is None):
            raise ValueError(f"{'B' if A is None else 'A'} is given alone: the factors A and B come in pairs")
        out, rank = mask.shape[0] if mask.dim() else 0, A.shape[0] if A is not None and A.dim() else 0
        source = {"B": " by the mask and A", "bias": " by the mask"}
        expected = {
            "mask": (mask, (out, -(-in_features // 8))),
            "values": (values, (values.numel(),)),
            "A": (A, (rank, in_features)),
            "B": (B, (out, rank)),
            "bias": (bias, (out,)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}{source.get(name, '')}")
            dtype = torch.uint8 if name == "mask" else values.dtype
            if tensor.dtype != dtype:
                of = "" if name == "mask" else " as the values have"
                raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}{of}")
            if tensor.device != values.device:
                raise ValueError(f"{name} is on {tensor.device}, but the values are on {values.device}")


def check_inputs(inputs: torch.Tensor, weight: PackedWeight) -> None:
    """That x fits a weight.

    Raises:
        ValueError: another width or device.
        TypeError: another dtype.
    """
    if not inputs.dim() or inputs.shape[-1] != weight.in_features:
        raise ValueError(f"inputs have shape {tuple(inputs.shape)}, expected (..., {weight.in_features})")
    if inputs.dtype != weight.values.dtype:
        raise TypeError(
            f"inputs of dtype {inputs.dtype} for a packed layer of dtype {weight.values.dtype}: cast one of "
            "them, or use torch.autocast"
        )
    if inputs.device != weight.values.device:
        raise ValueError(f"inputs are on {inputs.device}, but the packed layer is on {weight.values.device}")


def check_count(weight: PackedWeight, kept: int) -> None:
    """That there is a value for every kept column.

    Raises:
        ValueError: there is not.
    """
    if weight.values.numel() != kept:
        raise ValueError(f"values hold {weight.values.numel()} entries, but the mask keeps {kept}")
