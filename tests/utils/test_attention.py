"""Causal attention in parts against torch's own, outputs and gradients."""

import pytest
import torch
from torch.nn import functional as F

from hf_sparselr.utils import attention
from hf_sparselr.utils.attention import CausalAttention, causal_attention


def draw(heads: int, shared: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, count, length, 8) for count in (heads, shared, shared)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 3, 4, 10, 33])
def test_it_is_that_of_torch(length: int, heads: tuple[int, int], scale: float | None) -> None:
    inputs = draw(*heads, length)
    weights = torch.randn(2, heads[0], length, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale, enable_gqa=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    found = causal_attention(*inputs, scale=scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for mine, own in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"is_causal": False}, False),
        ({"enable_gqa": False}, False),
        ({"dropout_p": 0.1}, False),
        ({"is_causal": False, "attn_mask": torch.ones(6, 6, dtype=torch.bool)}, False),
    ],
    ids=str,
)
def test_only_what_it_can_do_is_taken(change: dict, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(attention, "causal_attention", lambda *args, **kwargs: calls.append(args) or args[0])
    query, key, value = (tensor.detach().float() for tensor in draw(4, 4, 6))
    options = {"is_causal": True, "enable_gqa": True, "dropout_p": 0.0, "scale": None, **change}
    with CausalAttention():
        F.scaled_dot_product_attention(query, key, value, **options)
        F.scaled_dot_product_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), **options)
    assert bool(calls) == taken and len(calls) <= 1
