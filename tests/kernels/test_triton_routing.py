"""The order of rows, the gate and the sum over a token's experts: compiled on a GPU, else by Triton's interpreter."""

import pytest
import torch
from helpers.kernel_cases import DEVICE
from torch.nn import functional as F

pytest.importorskip("triton")

from hf_sparselr.kernels.triton import routing


@pytest.mark.parametrize(
    ("tokens", "top", "experts"), [(1, 2, 8), (3, 1, 5), (9, 8, 128), (40, 2, 3), (300, 4, 6), (600, 4, 6)]
)
def test_pairs_in_order(tokens: int, top: int, experts: int) -> None:
    index = torch.randint(experts, (tokens, top), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    token, places, ends = routing.order_pairs(index, experts)
    ids, pairs = index.flatten(), torch.arange(tokens * top, device=DEVICE)
    assert torch.equal(places.long().sort().values, pairs)
    rows = torch.empty_like(ids)
    rows[places.long()] = ids
    assert torch.equal(rows, ids.sort().values)
    assert torch.equal(token[places.long()], pairs // top)
    assert torch.equal(ends.long(), torch.bincount(ids, minlength=experts).cumsum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 1536])
def test_gate(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2 * width, device=DEVICE, dtype=dtype)
    gate, up = x.double().chunk(2, 1)
    torch.testing.assert_close(routing.silu_gate(x), (F.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum(dtype: torch.dtype) -> None:
    x, weights = torch.randn(12, 1100, device=DEVICE, dtype=dtype), torch.rand(6, 2, device=DEVICE)
    places = torch.randperm(12).to(torch.int32).to(DEVICE)
    expected = (x.double()[places.long()].view(6, 2, -1) * weights.double()[:, :, None]).sum(1)
    torch.testing.assert_close(routing.combine(x, places, weights), expected.to(dtype))
