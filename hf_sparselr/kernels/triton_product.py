"""The product on a GPU, by the plan that was measured to be the fastest."""

from collections.abc import Sequence

import torch

from .choice import choose, known
from .decode import Packed, decode
from .plan import MAX_ROWS, UNPACKED, Plan, candidates, packed_plans
from .unpacked import multiply_unpacked


def triton_product(rows: torch.Tensor, layers: Sequence[Packed], kernel: str) -> list[torch.Tensor]:
    """x S^T + (x A^T) B^T + bias of layers that can share a launch, or of one.

    Args:
        rows: x (rows, in), at least one row; for several layers at most `MAX_ROWS`.
        layers: of one `kind`.
        kernel: "auto" or "packed".
    """
    count, dtype = rows.shape[0], rows.dtype
    if kernel == "packed" and count <= MAX_ROWS:
        return decode(rows, layers, packed_plans(count, dtype)[0])

    def run(plan: Plan) -> list[torch.Tensor]:
        if plan.form in UNPACKED:
            return [multiply_unpacked(rows, layer, plan) for layer in layers]
        if count <= MAX_ROWS:
            return decode(rows, layers, plan)
        return [torch.cat([decode(x, layers, plan)[0] for x in rows.split(MAX_ROWS)])]

    plan = known(count, layers)
    if plan is not None:
        return run(plan)
    options = candidates(count, dtype, max(layer.rank for layer in layers))
    if torch.cuda.is_current_stream_capturing():  # nothing can be measured now
        return run(options[0])
    return run(choose(count, layers, options, run))


def shared_product(
    rows: torch.Tensor, layers: Sequence[tuple], in_features: int, kernel: str
) -> list[torch.Tensor] | None:
    """`triton_product` of layers (mask, values, A, B, bias), or None if they are not alike or the rows too many."""
    if rows.shape[0] > MAX_ROWS or not all(mask.shape[0] for mask, *_ in layers):
        return None
    packed = [Packed.of(*layer, in_features) for layer in layers]
    kind = packed[0].kind
    if any(layer.kind != kind for layer in packed[1:]):
        return None
    return triton_product(rows, packed, kernel)
