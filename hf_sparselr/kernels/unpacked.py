"""x S^T + (x A^T) B^T + bias by a product that reads S dense, unpacked for the length of one call."""

import logging

import torch
from torch.nn import functional as F

from .decode import can_pair
from .densify import densify
from .index import SupportIndex
from .plan import Plan

logger = logging.getLogger(__name__)

_LEAST_SPARSE_ROWS = 1024  # below, compressing S again takes longer than the product
_TILE = 64  # cuSPARSELt takes whole tiles of S


def multiply_unpacked(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    index: SupportIndex,
    values: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: Plan,
) -> torch.Tensor:
    """(rows, in) to (rows, out), by the plan's form (see `Plan`).

    Raises:
        RuntimeError: cuSPARSELt does not take such a product ("sparse" only).
    """
    if plan.form == "sparse":
        return _multiply_sparse(inputs, mask, index, values, A, B, bias, plan.algorithm)
    if plan.form == "folded" or A is None:
        return F.linear(inputs, densify(mask, index, values, A, B), bias)
    y = F.linear(F.linear(inputs, A), B, bias)
    return y.addmm_(inputs, densify(mask, index, values).T)  # y is read where the larger product waits anyway


def sparse_plans(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    index: SupportIndex,
    values: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[Plan, ...]:
    """The "sparse" plan with the algorithm that cuSPARSELt finds the fastest for these inputs, if it takes them."""
    if not _may_be_sparse(len(inputs), index, values):
        return ()
    try:
        compressed = torch._cslt_compress(densify(mask, index, values))
        algorithm = torch._cslt_sparse_mm_search(compressed, _padded(inputs).T, bias, transpose_result=True)
    except RuntimeError as error:
        logger.info("the sparse tensor cores are not used: %s", error)
        return ()
    return (Plan("sparse", algorithm=algorithm),)


def _may_be_sparse(rows: int, index: SupportIndex, values: torch.Tensor) -> bool:
    """Whether the sparse tensor cores take S, and enough rows for it to pay."""
    if not (torch.backends.cusparselt.is_available() and can_pair(index, values)):
        return False
    whole = index.shape[0] % _TILE == 0 and index.in_features % _TILE == 0
    capable = torch.version.cuda is not None and torch.cuda.get_device_capability(values.device) >= (8, 0)
    return rows >= _LEAST_SPARSE_ROWS and whole and capable


def _multiply_sparse(inputs, mask, index, values, A, B, bias, algorithm: int) -> torch.Tensor:
    compressed = torch._cslt_compress(densify(mask, index, values))
    y = torch._cslt_sparse_mm(compressed, _padded(inputs).T, bias, transpose_result=True, alg_id=algorithm)
    y = y[: len(inputs)]
    return y if A is None else y.addmm_(F.linear(inputs, A), B.T)


def _padded(inputs: torch.Tensor) -> torch.Tensor:
    """With zero rows up to a multiple of 16."""
    missing = -len(inputs) % 16
    return F.pad(inputs, (0, 0, 0, missing)) if missing else inputs.contiguous()
