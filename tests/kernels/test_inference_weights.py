"""Weights that were made in inference mode, which count no edits."""

import pytest
import torch
from helpers.kernel_cases import problem

from hf_sparselr.kernels import fast_calls
from hf_sparselr.kernels.dispatch import packed_linear
from hf_sparselr.kernels.fast_calls import FastCall, updated
from hf_sparselr.kernels.packed_weight import PackedWeight

pytestmark = pytest.mark.skipif(fast_calls.compiled() is None, reason="no C compiler")


def ready(weight: PackedWeight, parameters: dict, x: torch.Tensor) -> FastCall:
    packed_linear(x, weight)
    fast = updated(None, (weight,), (parameters,), "auto", x)
    assert fast is not None
    return fast


@pytest.mark.parametrize("inference", [False, True])
def test_c_serves_them_until_the_mask_is_another_tensor(inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        weight = PackedWeight(*(None if p is None else p.clone() for p in problem(24, 64, 0.5, 3, True).weight[:5]), 64)
        parameters, x = dict(zip(fast_calls.PARTS, weight, strict=False)), torch.randn(2, 64)
        fast = ready(weight, parameters, x)
        out = fast.call(parameters, x, "auto")
        torch.testing.assert_close(out, packed_linear(x, weight))
        same_memory = weight.mask.view(weight.mask.shape) if inference else weight.mask.clone()
        assert fast.call(parameters | {"mask": same_memory}, x, "auto") is None


def test_edits_outside_of_inference_mode_are_seen() -> None:
    with torch.no_grad():
        weight = problem(24, 64, 0.5, 3, True).weight
        parameters, x = dict(zip(fast_calls.PARTS, weight, strict=False)), torch.randn(2, 64)
        fast = ready(weight, parameters, x)
        weight.mask.copy_(weight.mask.flip(0))
        assert fast.call(parameters, x, "auto") is None
