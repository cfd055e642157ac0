"""Weights in BF16 that are made once a step: the same outputs and gradients as autocast makes of S + B A."""

import gc
import weakref

import pytest
import torch
from helpers import tiny

from hf_sparselr.compression.rounded_weights import rounded_weights
from hf_sparselr.compression.working_linear import WorkingLinear
from hf_sparselr.format.decomposition import Decomposition


def layer(rank: int, bias: bool) -> WorkingLinear:
    generator = torch.Generator().manual_seed(0)
    S, B, A = (torch.randn(*shape, generator=generator) for shape in ((24, 16), (24, rank), (rank, 16)))
    mask = S.abs() > 0.7
    factors = (A, B) if rank else (None, None)
    return WorkingLinear(Decomposition(S * mask, mask, *factors), torch.ones(24) if bias else None)


def gradients(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in module.parameters()] + [x.grad]
    for tensor in (*module.parameters(), x):
        tensor.grad = None
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("read", [False, True])
def test_gradients_of_a_step_are_those_of_autocast(rank: int, bias: bool, read: bool) -> None:
    module = torch.nn.Sequential(layer(rank, bias))
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def backward() -> torch.Tensor:
        for half in x.split(2):  # two batches
            with torch.autocast("cpu", torch.bfloat16):
                out = module(half) if not read else torch.nn.functional.linear(half, module[0].weight)
                out.float().square().sum().backward()
        return out

    expected, reference = backward(), gradients(module, x)
    with rounded_weights(module, "bf16", trained=True) as weights:
        weights.clear()
        found = backward()
        weights.collect()
    assert (found - expected).float().norm() < 0.01 * expected.float().norm()
    for mine, own in zip(gradients(module, x), reference, strict=True):
        if own is None:
            assert mine is None
            continue
        assert (mine - own).norm() < 0.01 * own.norm()
    assert not (reference[0] * ~module[0].mask).any() and module[0].rounded is None


def test_gradients_do_not_move_zeros_and_start_anew_each_step() -> None:
    module, x = layer(3, True), torch.randn(6, 16)
    with rounded_weights(module, "bf16", trained=True) as weights:
        found = []
        for _ in range(2):
            weights.clear()
            module(x).float().sum().backward()
            weights.collect()
            found.append(module.S.grad.clone())
        assert torch.equal(*found) and not (found[0] * ~module.mask).any() and found[0].any()


def test_a_step_sees_the_weights_of_the_step_before() -> None:
    module, x = layer(3, False), torch.randn(6, 16)
    with torch.no_grad(), rounded_weights(module, "bf16") as weights:
        before = module(x)
        module.S.mul_(2)
        assert torch.equal(module(x), before)
        weights.refresh()
        assert not torch.equal(module(x), before)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_other_precisions_stay_as_they_are(precision: str) -> None:
    module = layer(3, True)
    with rounded_weights(module, precision):
        assert module.rounded is None and module(torch.randn(2, 16)).dtype == torch.float32


def test_a_layer_is_freed_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        module = layer(3, True)
        module(torch.randn(2, 16)).sum().backward()
        freed = weakref.ref(module.S)
        del module
        assert freed() is None
    finally:
        gc.enable()


def test_blocks_matched_in_bf16_improve() -> None:
    import hf_sparselr

    settings = tiny.settings(refine="tm", tm={"passes": 3, "precision": "bf16", "lr": 1e-3})
    model = hf_sparselr.compress(tiny.build("llama"), settings)
    assert all(block["tm"]["loss_after"] < block["tm"]["loss_before"] for block in model.sparselr_report.blocks)
