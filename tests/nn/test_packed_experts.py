"""Stacks of experts in transformers' own experts modules: every implementation gives what dense experts give."""

import pytest
import torch

from hf_sparselr.bench.experts import random_experts
from hf_sparselr.format.bitmask import unpack_mask
from hf_sparselr.format.patterns import parse
from hf_sparselr.nn.packed_experts import IMPLEMENTATIONS

SHAPE = (6, 2, 32, 48)  # experts, experts a token, hidden size, inner size


def routed(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, SHAPE[2], generator=generator)
    index = torch.rand(tokens, SHAPE[0], generator=generator).topk(SHAPE[1]).indices
    return x, index, torch.rand(tokens, SHAPE[1], generator=generator)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_implementation_gives_the_dense_product(implementation: str | None, tokens: int) -> None:
    packed, dense = random_experts(SHAPE, parse("2:4"), 4, torch.float32, torch.device("cpu"))
    packed.config._experts_implementation = dense.config._experts_implementation = implementation
    torch.testing.assert_close(packed(*routed(tokens)), dense(*routed(tokens)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_reach_every_part(implementation: str) -> None:
    packed, dense = random_experts(SHAPE, parse(0.5), 4, torch.float32, torch.device("cpu"))
    packed.config._experts_implementation, dense.config._experts_implementation = implementation, "eager"
    for parameter in [*packed.parameters(), *dense.parameters()]:
        parameter.requires_grad_(parameter.is_floating_point())
    inputs = [[t.clone().requires_grad_(t.is_floating_point()) for t in routed(40)] for _ in range(2)]
    for module, given in zip((packed, dense), inputs, strict=True):
        module(*given).square().sum().backward()
    for one, other in zip(*inputs, strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    for name in ("gate_up_proj", "down_proj"):
        gradients = getattr(dense, name).grad
        for layer, gradient in zip(getattr(packed, name), gradients, strict=True):
            support = unpack_mask(layer.mask, layer.in_features)
            torch.testing.assert_close(layer.values.grad, gradient[support], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(layer.B.grad, gradient @ layer.A.T, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(layer.A.grad, layer.B.T @ gradient, atol=1e-4, rtol=1e-3)
