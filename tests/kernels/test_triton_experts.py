"""S and the factors of experts in one launch against float64: compiled on a GPU, else by Triton's interpreter."""

import pytest
import torch
from helpers.kernel_cases import DEVICE, problem

pytest.importorskip("triton")

from hf_sparselr.kernels.cuda.experts import table_entries
from hf_sparselr.kernels.support_index import index_of
from hf_sparselr.kernels.triton.experts import Unpacking


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "n", "kind", "ranks"), [
    (9, 128, "2:4", (3, 5)), (5, 320, "4:8", (0, 0)), (7, 136, 0.5, (2, 70)), (3, 264, 0.7, (1, 1)),
])  # fmt: skip
def test_experts_with_rows(out, n, kind, ranks, dtype) -> None:
    cases = [problem(out, n, kind, rank, dtype=dtype) for rank in (ranks[0], *ranks)]
    weights = [case.weight for case in cases]
    indices = [index_of(weight.mask, n) for weight in weights]
    sizes = 3, out, n, indices[0].shape[1]
    per_block = indices[0].per_block
    unpacking = Unpacking(table_entries(weights, indices), sizes, max(ranks), indices[0].pairs, per_block, dtype)
    ends = torch.tensor([2, 2, 3], dtype=torch.int32, device=DEVICE)  # the second expert has no rows
    dense = unpacking.weights(ends)
    assert dense.shape[2] % 8 == 0
    for expert, case in ((0, cases[0]), (2, cases[2])):
        assert torch.equal(dense[expert, :, :n], case.S.to(dtype))
        if max(ranks):
            A, B = unpacking.factors(ends)[expert], dense[expert, :, n:]
            torch.testing.assert_close(B.double() @ A.double(), case.dense - case.S)
