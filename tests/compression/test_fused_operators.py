"""Fused operators compute what a block's own ones do. They are looked at on the CPU, though only GPUs take them."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_sparselr.compression.fused_operators import fused_operators, rms_norms


class Scaled(nn.Module):
    """Has a vector of weights and an epsilon, and is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden


@pytest.mark.parametrize("norm", [LlamaRMSNorm(16, 1e-5), GemmaRMSNorm(16, 1e-6), nn.RMSNorm(16, 1e-3)])
def test_rms_norms_are_found_by_what_they_compute(norm: nn.Module) -> None:
    nn.init.normal_(norm.weight)
    ((found, forward),) = rms_norms(nn.ModuleList([norm])).items()
    hidden, weight = torch.randn(3, 5, 16) * 1e-2, norm.weight
    results = []
    for function in (norm.forward, forward):
        x = hidden.clone().requires_grad_()
        outputs = function(x)
        results.append((outputs, *torch.autograd.grad(outputs.square().sum(), (x, weight))))
    assert found is norm
    for own, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [nn.LayerNorm(16, bias=False), nn.Linear(16, 16), Scaled()])
def test_other_modules_stay_as_they_are(module: nn.Module) -> None:
    assert not rms_norms(nn.ModuleList([module]))


def test_half_precision_norms_stay_as_they_are() -> None:
    norm = LlamaRMSNorm(16)
    (forward,) = rms_norms(nn.ModuleList([norm])).values()
    hidden = torch.randn(3, 16, dtype=torch.bfloat16)
    assert torch.equal(forward(hidden), norm(hidden))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_inside_on_a_gpu_a_block_takes_them(precision: str) -> None:
    norm = LlamaRMSNorm(16).cuda()
    with fused_operators(nn.ModuleList([norm]), torch.device("cuda"), precision):
        assert ("forward" in vars(norm)) == (precision != "fp32")
    assert "forward" not in vars(norm)
