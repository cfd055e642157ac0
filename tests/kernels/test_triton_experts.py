"""S + B A of experts in one launch against float64: compiled on a GPU, else by Triton's interpreter."""

import pytest
import torch
from helpers.kernel_cases import DEVICE, assert_near, problem

pytest.importorskip("triton")

from hf_sparselr.kernels.cuda.experts import table_entries
from hf_sparselr.kernels.support_index import index_of
from hf_sparselr.kernels.triton.experts import bind_densify_experts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "n", "kind", "ranks"), [
    (9, 128, "2:4", (3, 5)), (5, 320, "4:8", (0, 0)), (7, 136, 0.5, (2, 70)), (3, 264, 0.7, (1, 1)),
])  # fmt: skip
def test_experts_with_rows(out, n, kind, ranks, dtype) -> None:
    cases = [problem(out, n, kind, rank, dtype=dtype) for rank in (ranks[0], *ranks)]
    weights = [case.weight for case in cases]
    indices = [index_of(weight.mask, n) for weight in weights]
    table = table_entries(weights, indices)
    densify = bind_densify_experts(table, 3, out, n, indices[0].shape[1], max(ranks), indices[0].per_block, dtype)
    dense = densify(torch.tensor([2, 2, 3], dtype=torch.int32, device=DEVICE))  # the second has no rows
    for expert in (0, 2):
        assert_near(dense[expert], cases[expert].dense, dtype)
