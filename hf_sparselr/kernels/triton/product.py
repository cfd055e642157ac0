"""The product on a GPU, by the plan that was measured to be the fastest."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from ..autotune import choose, known
from ..cuda.sparse_cores import multiply_sparse, prepare, sparse_plans
from ..launch_config import DECODE, MAX_ROWS, MOST_BLOCK_ROWS, SPARSE, Plan, candidates, packed_plans
from .decode import Packed, decode
from .medium_batch import multiply_blocks
from .unpack_then_gemm import multiply_unpacked


def triton_product(rows: torch.Tensor, layers: Sequence[Packed], kernel: str) -> list[torch.Tensor]:
    """x S^T + (x A^T) B^T + bias of every layer; up to 16 rows, layers that are alike share a launch.

    Each comes out as it would alone, to the bit: layers whose plans sum in different orders do not share one.

    Args:
        rows: x (rows, in), at least one row.
        layers: with at least one row of S each.
        kernel: "auto" or "packed".
    """
    plans = [_plan(rows, layer, kernel) for layer in layers]
    launches, outs = defaultdict(list), {}
    for number, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
        shares = len(layers) > 1 and plan.form in DECODE
        launches[(plan.order, layer.kind) if shares else number].append(number)
    for numbers in launches.values():
        largest = max(numbers, key=lambda number: layers[number].index.shape[0])
        results = _run(rows, [layers[number] for number in numbers], plans[largest])
        outs.update(zip(numbers, results, strict=True))
    return [outs[number] for number in range(len(layers))]


def _plan(rows: torch.Tensor, layer: Packed, kernel: str) -> Plan:
    count = rows.shape[0]
    if kernel == "packed" and count <= MAX_ROWS:
        return packed_plans(count, rows.dtype)[0]
    capturing = rows.is_cuda and torch.cuda.is_current_stream_capturing()
    sparse = count > MOST_BLOCK_ROWS and layer.index.pairs and prepare(rows.device, capturing)
    plan = known(count, layer, capturing)
    if plan is not None and (sparse or plan.form not in SPARSE):
        return plan
    options = candidates(count, rows.dtype, layer.rank)
    if capturing:  # nothing can be measured now
        return options[0]
    if sparse:
        options += sparse_plans(rows, layer)
    return choose(count, layer, options, lambda plan: _run(rows, [layer], plan))


def _run(rows: torch.Tensor, layers: list[Packed], plan: Plan) -> list[torch.Tensor]:
    if plan.form in DECODE:
        return decode(rows, layers, plan)
    if plan.form in SPARSE:
        multiply = multiply_sparse
    else:
        multiply = multiply_blocks if plan.form == "blocks" else multiply_unpacked
    return [multiply(rows, layer, plan) for layer in layers]
