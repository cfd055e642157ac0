"""Weights of the errors of a layer's outputs, against Jacobians."""

import logging

import pytest
import torch
from helpers import tiny
from torch import nn

from hf_sparselr import compress
from hf_sparselr.compression.activations import Workplace
from hf_sparselr.compression.capture import Call
from hf_sparselr.compression.output_weights import FLOOR, output_weights
from hf_sparselr.nn.packed_experts import ExpertStack

CPU = torch.device("cpu")
PLACE = Workplace(CPU, CPU, torch.float32, "fp32")


class Gated(nn.Module):
    """Layers whose outputs reach the block's output through known factors, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.unused, self.inner = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 5)
        self.outer = nn.Linear(5, 4)
        self.factors = torch.tensor([0.1, 1.0, 3.0, 5.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        return self.plain(x) * self.factors + self.outer(torch.tanh(self.inner(x)))


def windows(count: int = 6, length: int = 40, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, width, generator=generator) for _ in range(count)]


def weights_of(block: nn.Module, layers: list[str], hidden: list[torch.Tensor], masks: tuple = ()) -> dict:
    return output_weights(block, layers, hidden, [Call((), {}, None, masks)] * len(hidden), PLACE)


def test_weights_are_the_squared_jacobian() -> None:
    torch.manual_seed(0)
    block, hidden = Gated(), windows()
    found = weights_of(block, ["plain", "inner", "outer"], hidden)
    squares = block.factors.square()
    torch.testing.assert_close(found["plain"], squares / squares.mean() + FLOOR)
    torch.testing.assert_close(found["outer"], torch.ones(4) + FLOOR)
    with torch.no_grad():
        slopes = 1 - torch.tanh(block.inner(torch.cat(hidden))).square()  # (windows, length, 5)
        squares = (slopes.square().mean((0, 1)) * block.outer.weight.square().sum(0)).detach()
    torch.testing.assert_close(found["inner"], squares / squares.mean() + FLOOR, rtol=0.3, atol=0.02)


def test_a_layer_without_a_say_has_no_weights() -> None:
    assert weights_of(Gated(), ["plain", "unused"], windows()).keys() == {"plain"}


def test_padding_does_not_count() -> None:
    class Growing(nn.Module):
        """The output depends more on later positions."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            late = torch.arange(x.shape[1])[:, None] >= 20
            return self.layer(x) * torch.where(late, torch.tensor([1.0, 9.0, 9.0, 9.0]), 1.0)

    mask = (torch.arange(40) < 20).expand(2, -1)
    found = weights_of(Growing(), ["layer"], windows(), (mask,))["layer"]
    torch.testing.assert_close(found, torch.ones(4) + FLOOR)


def test_experts_have_none() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = ExpertStack([nn.Linear(6, 4), nn.Linear(6, 4)], (2, 4, 6))
            self.plain = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(x) + sum(expert(x) for expert in self.experts)

    assert weights_of(Routed(), ["experts.0", "experts.1", "plain"], windows()).keys() == {"plain"}


def test_a_block_without_derivative_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no derivative")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Opaque.apply(self.layer(x))

    with caplog.at_level(logging.WARNING):
        assert weights_of(Block(), ["layer"], windows()) == {}
    assert "cannot be differentiated (no derivative)" in caplog.text


def test_a_block_may_change_its_inputs_in_place() -> None:
    class InPlace(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    torch.manual_seed(0)
    block, hidden = InPlace(), windows()
    assert weights_of(block, ["plain"], hidden).keys() == {"plain"}
    assert all(map(torch.equal, hidden, windows()))


def test_nothing_of_the_block_changes() -> None:
    block = Gated()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    weights_of(block, ["plain"], windows())
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in block.parameters())
    assert not block.plain._forward_hooks


@pytest.mark.parametrize("sparsity", ["2:4", 0.6])
def test_errors_go_where_they_do_less_harm(sparsity) -> None:
    errors = {}
    for weighed in (True, False):
        model = tiny.build("llama")
        mlp = model.model.layers[0].mlp
        faint = torch.arange(mlp.up_proj.out_features) % 2 == 0
        mlp.down_proj.weight.data[:, faint] *= 0.01  # the block hardly depends on these outputs of up_proj
        dense = mlp.up_proj.weight.detach().clone()
        options = {"weigh_outputs": weighed, "min_iterations": 30, "max_iterations": 60}
        packed = compress(model, tiny.settings(sparsity=sparsity, method_options=options))
        error = (packed.model.layers[0].mlp.up_proj.weight - dense).square()
        errors[weighed] = float(error[~faint].sum()), float(error[faint].sum())
    assert errors[True][0] < 0.9 * errors[False][0] and errors[True][1] > errors[False][1]
