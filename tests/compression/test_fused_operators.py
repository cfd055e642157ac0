"""Fused operators compute what a block's own ones do. They are looked at on the CPU, though only GPUs take them."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_sparselr.compression import fused_operators as module
from hf_sparselr.compression.fused_operators import FusedAttention, fused_operators, rms_norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Scaled(nn.Module):
    """Has a vector of weights and an epsilon, and is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden


class Gated(LlamaRMSNorm):
    """Multiplies what it normalises by a gate, if it gets one."""

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden if gate is None else hidden * F.silu(gate))


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


def test_a_gated_norm_keeps_its_gate() -> None:
    """A norm as Mamba-2's is an RMS norm where it gets no gate, and more where it gets one."""
    norm, hidden, gate = Gated(16), torch.randn(3, 16), torch.randn(3, 16)
    (forward,) = rms_norms(nn.ModuleList([norm])).values()
    for outputs in (forward(hidden, gate), forward(hidden, gate=gate)):
        assert torch.equal(outputs, norm(hidden, gate))
    torch.testing.assert_close(forward(hidden), norm(hidden))


def attend(mode, tensors: list[torch.Tensor], size: float = 1.0, **options) -> list[torch.Tensor]:
    """The outputs of attention, and gradients of this size."""
    with mode:
        outputs = F.scaled_dot_product_attention(*tensors, enable_gqa=True, **options)
    return [outputs, *torch.autograd.grad(outputs.float().square().sum() * size, tensors)]


def heads(device: str, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, count, length, 16, generator=generator).to(device).requires_grad_() for count in (4, 2, 2)]


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12], ids=str)
def test_attention_in_half_precision_keeps_small_and_large_gradients(size: float, monkeypatch) -> None:
    """FP16 holds neither gradients of 1e-12 nor of 1e12."""
    monkeypatch.setattr(module, "_fits", lambda *_: True)
    tensors = heads(DEVICE)
    results = [attend(mode, tensors, size, is_causal=True) for mode in (nullcontext(), FusedAttention())]
    for own, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert (half - own).norm() < 2e-3 * own.norm()


def test_attention_with_a_mask_is_not_rounded_to_half_precision() -> None:
    mask = (torch.rand(24, 24) > 0.3).fill_diagonal_(True).to(DEVICE)
    results = [attend(mode, heads(DEVICE), attn_mask=mask) for mode in (nullcontext(), FusedAttention())]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_attention_under_autocast_is_that_of_autocast(kind: torch.dtype | None, monkeypatch) -> None:
    if DEVICE == "cpu":  # a GPU has no fused kernel for a mask and shared keys
        monkeypatch.setattr(module, "_fits", lambda *_: True)
    options = {"is_causal": True}
    if kind is not None:
        mask = (torch.rand(24, 24) > 0.3).fill_diagonal_(True).to(DEVICE)
        options = {"attn_mask": mask if kind == torch.bool else torch.where(mask, 0.0, -1e4)}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = [attend(mode, heads(DEVICE), **options) for mode in (nullcontext(), FusedAttention())]
    for own, fused in zip(*results, strict=True):
        assert fused.dtype == own.dtype
        torch.testing.assert_close(fused, own, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_attention_are_the_same_bits_each_time(dtype: torch.dtype) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        runs = [attend(FusedAttention(), heads("cuda", 1024), is_causal=True) for _ in range(8)]
    assert not torch.are_deterministic_algorithms_enabled()
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_inside_on_a_gpu_a_block_takes_them(precision: str) -> None:
    norm = LlamaRMSNorm(16).cuda()
    with fused_operators(nn.ModuleList([norm]), torch.device("cuda"), precision):
        assert ("forward" in vars(norm)) == (precision != "fp32")
    assert "forward" not in vars(norm)
