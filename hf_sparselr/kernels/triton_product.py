"""The product on a GPU, by the plan that was measured to be the fastest."""

import torch

from .choice import choose, known
from .decode import decode
from .index import index_of
from .plan import MAX_ROWS, UNPACKED, Plan, candidates, packed_plans
from .unpacked import multiply_unpacked


def triton_product(
    rows: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    kernel: str,
) -> torch.Tensor:
    """x S^T + (x A^T) B^T + bias: (rows, in) to (rows, out), at least one row. `kernel`: "auto" or "packed"."""
    count, rank, index = rows.shape[0], 0 if A is None else A.shape[0], index_of(mask, in_features)
    layer = mask, index, values, A, B, bias
    if kernel == "packed" and count <= MAX_ROWS:
        return decode(rows, *layer, packed_plans(count, values.dtype)[0])

    def run(plan: Plan) -> torch.Tensor:
        if plan.form in UNPACKED:
            return multiply_unpacked(rows, *layer, plan)
        if count <= MAX_ROWS:
            return decode(rows, *layer, plan)
        return torch.cat([decode(x, *layer, plan) for x in rows.split(MAX_ROWS)])

    plan = known(count, rank, index, values)
    if plan is not None:
        return run(plan)
    options = candidates(count, values.dtype, rank)
    if torch.cuda.is_current_stream_capturing():  # nothing can be measured now
        return run(options[0])
    return run(choose(count, rank, index, values, options, run))
