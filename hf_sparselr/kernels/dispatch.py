"""The entry to the packed product: which way is taken where."""

from collections.abc import Sequence

import torch

from . import ops
from .reference import reference_linear


def packed_linear(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    kernel: str = "auto",
) -> torch.Tensor:
    """x S^T + (x A^T) B^T + bias. Follows autocast, as F.linear does.

    On CUDA the operator of `ops`, differentiable once; elsewhere too if nothing is differentiated. Else the
    reference, differentiable twice.

    Args:
        inputs: x (..., in).
        mask: uint8 (out, ceil(in / 8)), see `packing`; `values`: (nonzeros,).
        A, B: (rank, in) and (out, rank), or None.
        bias: (out,) or None.
        in_features: in.
        kernel: "auto" takes what was measured to be the fastest, "packed" never unpacks S for up to 16 rows of x,
            "dense" keeps S + B A in memory. The environment variable HF_SPARSELR_KERNEL overrides it.

    Returns:
        (..., out).

    Raises:
        ValueError: an unknown kernel.
        TypeError: floats of different dtypes.
    """
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        inputs, values = inputs.to(dtype), values.to(dtype)
        A, B, bias = (tensor if tensor is None else tensor.to(dtype) for tensor in (A, B, bias))
    trained = torch.is_grad_enabled() and _any_requires_grad(values, A, B, bias)
    differentiated = trained or (torch.is_grad_enabled() and inputs.requires_grad)
    if not ((kind == "cuda" and ops.TRITON) or (kind == "cpu" and not differentiated)):
        return reference_linear(inputs, mask, values, A, B, bias, in_features)
    _check_dtypes(inputs, values, A, B, bias)
    if trained and kernel == "dense":
        kernel = "auto"  # what is being trained changes with every step: there is nothing to keep
    # An operator costs time in Python.
    run = ops.linear if differentiated or torch.compiler.is_compiling() else ops.product
    return run(inputs, mask, values, A, B, bias, in_features, kernel)


def packed_linears(
    inputs: torch.Tensor, layers: Sequence[tuple], in_features: int, kernel: str = "auto"
) -> list[torch.Tensor]:
    """`packed_linear` for layers with the same input, not differentiable: up to 16 rows on a GPU take one launch.

    Args:
        inputs: x (..., in).
        layers: (mask, values, A, B, bias) of each.

    Returns:
        (..., out) of each.
    """
    if inputs.device.type != "cuda" or not ops.TRITON or torch.is_autocast_enabled("cuda"):
        return [packed_linear(inputs, *layer, in_features, kernel) for layer in layers]
    for layer in layers:
        _check_dtypes(inputs, *layer[1:])
    if torch.compiler.is_compiling():
        return ops.linears(inputs, *(list(parts) for parts in zip(*layers, strict=True)), in_features, kernel)
    return ops.products(inputs, layers, in_features, kernel)


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check_dtypes(inputs: torch.Tensor, *others: torch.Tensor | None) -> None:
    for tensor in others:
        if tensor is not None and tensor.dtype != inputs.dtype:
            raise TypeError(
                f"inputs of dtype {inputs.dtype} for a packed layer of dtype {tensor.dtype}: cast one of them, or "
                "use torch.autocast"
            )
