"""What runs packed experts on a GPU, with a plain product in the place of its kernels, against modules' own loops."""

import pytest
import torch
from compression.test_experts_families import FAMILIES, build
from torch import nn

pytest.importorskip("triton")

from hf_sparselr.compression.experts import unfuse, weights_of_experts
from hf_sparselr.integrations.transformers import experts_forward
from hf_sparselr.nn.packed_experts import ExpertStack


class PlainTable:
    """An `ExpertTable` on the CPU, with room for three columns."""

    def __init__(self, stack: ExpertStack) -> None:
        self.stack, self.experts = stack, len(stack)

    def room(self, rows: int) -> int:
        return 3

    def grouped(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        x[:, -3:] = torch.nan  # anything may be there
        return self.stack.multiply(x[:, :-3], ends)


# With biases and an interleaved gate, transposed, without a gate, with a norm, plain.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in (
    "gpt_oss", "aria", "nemotron_h", "muse_spark", "mixtral", "gemma4"
)])  # fmt: skip
@torch.no_grad()
def test_modules_of_every_kind(name: str) -> None:
    for cls_name in FAMILIES[name]:
        experts: nn.Module = build(name, cls_name)
        counts = weights_of_experts(experts)
        for key, count in counts.items():
            unfuse(experts, key, count)
        up, down = (getattr(experts, key) for key in counts)
        for tokens in (1, 9):
            x = torch.randn(tokens, next(iter(down)).out_features)
            index, weights = torch.rand(tokens, len(up)).topk(2).indices, torch.rand(tokens, 2)
            expected = experts(x, index, weights)
            actual = experts_forward._multiply(experts, x, index, weights, PlainTable(up), PlainTable(down))
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_installed_in_front_of_transformers_own_functions() -> None:
    for _ in range(2):
        experts_forward.install()
    experts = build("mixtral", "MixtralExperts")
    x, index, weights = torch.randn(5, 32), torch.rand(5, 4).topk(2).indices, torch.rand(5, 2)
    expected = experts(x, index, weights)
    for implementation in experts_forward.NAMES:
        experts.config._experts_implementation = implementation
        torch.testing.assert_close(experts(x, index, weights), expected, atol=1e-4, rtol=1e-4)
        assert experts_forward.run(experts, x, index, weights) is None  # dense
