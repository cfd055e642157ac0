"""The product with a hierarchical matrix, x (..., in) to (..., out), as batched products.

One batched product a level gives the right factors of its blocks times their inputs, which their siblings take. One
more for all levels multiplies by the left factors, and one by the leaves. A, B and the leaves are read once, whatever
the depth. (format/hierarchy.py defines the tensors.)

On CUDA up to `FEW_ROWS` rows take two Triton launches where nothing is differentiated. torch.compile sees the batched
products.
"""

from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch.nn import functional as F

from ..format.hierarchy import (
    FLOAT_PARTS,
    ORDER_PARTS,
    Hierarchy,
    HierarchyShape,
    leaf_blocks,
    pad_factors,
    pad_to,
)
from ..utils.availability import TRITON
from ..utils.precision import multiplies_natively
from .reference import autocast_dtype
from .tensor_cache import TensorCache

FEW_ROWS = 16
_FEW_COLUMNS = 4
_PRODUCTS: TensorCache[Any] = TensorCache()  # of `bind_few`
_PLAIN = {torch.Tensor, torch.nn.Parameter}  # another subclass may stand for anything
_weights = attrgetter(*FLOAT_PARTS, *ORDER_PARTS)
_requires_grad, _dtype = attrgetter("requires_grad"), attrgetter("dtype")
_pointer, _device = torch.Tensor.data_ptr, torch.Tensor.get_device
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def hierarchical_product(inputs: torch.Tensor, hierarchy: Hierarchy, base: torch.Tensor | None = None) -> torch.Tensor:
    """x L^T, plus `base`; differentiable in x, A, B, the leaves and the base. Follows autocast, as F.linear does.

    Args:
        inputs: (..., in).
        hierarchy: L, in the dtype of the inputs.
        base: (..., out) or None.

    Returns:
        (..., out).
    """
    shape, rows = hierarchy.shape, inputs.reshape(-1, hierarchy.shape.in_features)
    if _takes_few(rows, hierarchy, base):
        outputs = multiply_few(rows, hierarchy, None if base is None else base.reshape(-1, shape.out_features))
        return outputs.view(*inputs.shape[:-1], shape.out_features)
    if hierarchy.column_order is not None:
        rows = rows.index_select(1, hierarchy.column_order)
    factors, dtype = (hierarchy.A, hierarchy.B, hierarchy.leaves), autocast_dtype(rows) or rows.dtype
    if rows.is_cpu and not multiplies_natively(dtype):
        with torch.autocast("cpu", enabled=False):
            outputs = _product(shape, *(tensor.to(dtype).float() for tensor in (rows, *factors))).to(dtype)
    else:
        outputs = _product(shape, rows, *factors)
    if hierarchy.row_order is not None:
        outputs = torch.empty_like(outputs).index_copy(1, hierarchy.row_order.long(), outputs)
    outputs = outputs.view(*inputs.shape[:-1], shape.out_features)
    return outputs if base is None else base + outputs


def multiply_few(rows: torch.Tensor, hierarchy: Hierarchy, base: torch.Tensor | None = None) -> torch.Tensor:
    """x L^T, plus `base`, of at most `FEW_ROWS` rows in two launches: (rows, in) and (rows, out) to (rows, out)."""
    weights = [tensor for tensor in _weights(hierarchy) if tensor is not None]
    key = (hierarchy.shape, len(rows), base is None, rows.dtype, *map(_pointer, weights))
    with _on_device_of(rows):
        product = _PRODUCTS.get(key)
        if product is None:
            from .triton.hierarchy import bind_few

            product = _PRODUCTS.put(key, bind_few(hierarchy, len(rows), base is not None), weights)
        return product(_aligned(rows), None if base is None else _aligned(base))


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    if not tensor.is_cuda or torch._C._cuda_getDevice() == tensor.get_device():
        return nullcontext()
    return torch.cuda.device_of(tensor)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, at an address that wide loads take."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _takes_few(rows: torch.Tensor, hierarchy: Hierarchy, base: torch.Tensor | None) -> bool:
    if (
        not (rows.is_cuda and TRITON and 0 < len(rows) <= FEW_ROWS)
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cuda")
    ):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap, grad or jvp of torch.func
        return False
    A, B, leaves = hierarchy.A, hierarchy.B, hierarchy.leaves
    tensors = [rows, A, B, leaves] if base is None else [rows, A, B, leaves, base]
    if torch.is_grad_enabled() and any(map(_requires_grad, tensors)):
        return False
    if not _PLAIN.issuperset(map(type, tensors)) or set(map(_dtype, tensors)) != {rows.dtype}:
        return False
    as_stored = A.is_contiguous() and B.is_contiguous() and leaves.is_contiguous()
    return as_stored and rows.dtype in _TRITON_DTYPES and set(map(_device, tensors)) == {rows.get_device()}


def _product(
    shape: HierarchyShape, rows: torch.Tensor, A: torch.Tensor, B: torch.Tensor, leaves: torch.Tensor
) -> torch.Tensor:
    """(rows, in) to (rows, out), both in the order of positions."""
    segments = 2**shape.depth
    A, B = pad_factors(shape, A, B)
    rows = pad_to(rows, len(rows), shape.padded[1])
    passed = _pass_to_siblings(shape, rows, A)
    x = rows.unflatten(1, (segments, -1)).transpose(0, 1)
    outputs = _answers(x, leaf_blocks(shape, leaves), passed, B.unflatten(0, (segments, -1)))
    return outputs.transpose(0, 1).flatten(1)[:, : shape.out_features]


def _pass_to_siblings(shape: HierarchyShape, rows: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """What every leaf gets from the siblings of its blocks, level by level: (2^depth, rows, sum of ranks)."""
    seen = [_by_block(rows, A[span], 2**level) for level, span in enumerate(shape.spans, start=1)]
    passed = seen[0].new_empty(2**shape.depth, len(rows), shape.rank)
    for level, (span, sums) in enumerate(zip(shape.spans, seen, strict=True), start=1):
        taken = passed[:, :, span].unflatten(0, (2 ** (level - 1), 2, -1))  # by pair of siblings and leaf
        given = sums.unflatten(0, (-1, 2))[:, :, None]
        taken[:, 0] = given[:, 1]
        taken[:, 1] = given[:, 0]
    return passed


def _by_block(rows: torch.Tensor, A: torch.Tensor, blocks: int) -> torch.Tensor:
    """(rows, in) times (ranks, in), each cut into blocks of columns: (blocks, rows, ranks)."""
    x, parts = (matrix.unflatten(1, (blocks, -1)).transpose(0, 1) for matrix in (rows, A))
    if x.device.type == "cpu":  # where a batched product would copy parts of A
        return torch.stack([F.linear(x, part) for x, part in zip(x.unbind(), parts.unbind(), strict=True)])
    return x @ parts.mT


def _answers(x: torch.Tensor, leaves: torch.Tensor, passed: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Every leaf's product and that of its rows of B: (segments, rows, leaf rows)."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] <= _FEW_COLUMNS:
        outputs = leaves @ x.mT  # weights at the left are read twice as fast
        return torch.baddbmm(outputs, B.to(outputs), passed.mT.to(outputs)).mT
    outputs = x @ leaves.mT
    return torch.baddbmm(outputs, passed.to(outputs), B.mT.to(outputs))
