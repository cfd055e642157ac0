"""What holds for every registered method: patterns on hard layers, stats, refinement after it, agreement on the GPU."""

import json

import pytest
import torch
from helpers import tiny
from helpers.layer_problems import problem
from helpers.layer_references import objective

from hf_sparselr import compress
from hf_sparselr.format.bitmask import unpack, unpack_mask
from hf_sparselr.format.patterns import EMPTY, parse
from hf_sparselr.nn.linear import packed_layers
from hf_sparselr.solvers.gram import ScaledGram
from hf_sparselr.solvers.registry import METHODS, PRECOMPUTED

QUICK = {
    "3basil": tiny.FAST,
    "oats": {"iterations": 6},
    "hassle-free-sparsegpt": {"iterations": 3},
    "hassle-free-alps": {"iterations": 2, "pruner_options": {"max_iterations": 12}},
    "sslc": {"iterations": 6},
    "alps": {"max_iterations": 15},
}
NAMES = [name for name in METHODS if name != PRECOMPUTED]
SPARSITIES = ["2:4", "1:4", "3:8", 0.0, 0.5, 0.9]
TM = {"passes": 3, "batch_size": 4, "lr": 1e-3}
DISTILL = {"passes": 2, "batch_size": 4, "lr": 3e-3, "self_samples": 0}


def solve(name: str, weight: torch.Tensor, gram: ScaledGram, sparsity: str | float):
    """With rank 3 where the method has a low-rank part."""
    method = METHODS[name]
    pattern, rank = parse(sparsity) if method.sparse else EMPTY, 3 if method.low_rank else 0
    result = method.solve(weight, gram, pattern, rank, method.options(**QUICK.get(name, {})), seed=0)
    assert int(result.mask.sum()) == pattern.kept(weight.shape) and pattern.allows(result.mask)
    assert not result.S[~result.mask].any()
    return result


@pytest.mark.parametrize("damping", [(0.005, 0.005), (0.0, 0.0)], ids=["damped", "undamped"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", NAMES)
def test_dead_inputs_and_fewer_tokens_than_inputs(name: str, sparsity, damping) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape, tokens in (((8, 24), 1), ((8, 24), 5), ((40, 24), 5), ((8, 24), 100)):
        inputs = torch.randn(tokens, 24, generator=generator) * torch.logspace(-1, 1, 24)
        dead = [0, 1, 2, 3, 9]  # a whole group, and one of another
        inputs[:, dead] = 0
        gram = ScaledGram(inputs.T @ inputs, damping)
        weight = torch.randn(*shape, generator=generator)
        dense = solve(name, weight, gram, sparsity).dense()
        assert torch.isfinite(dense).all() and not dense[:, dead].any()
        assert float((dense * gram.scale).abs().max()) < 100 * float((weight * gram.scale).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_all_report_the_same_stats(name: str) -> None:
    weight, gram = problem(16, 24)
    result = solve(name, weight, gram, "2:4")
    assert result.stats["objective"] == pytest.approx(objective(weight, result, gram), rel=1e-3)
    assert type(result.stats["iterations"]) is int and type(result.stats["converged"]) is bool
    assert json.loads(json.dumps(result.stats)) == result.stats


def settings(name: str, sparsity, **changes):
    method = METHODS[name]
    fields = {"rank": 4 if method.low_rank else 0, "sparsity": sparsity if method.sparse else None}
    return tiny.settings(method=name, method_options=QUICK.get(name, {}), tm=TM, distill=DISTILL, **fields, **changes)


@pytest.mark.parametrize("sparsity", ["2:4", 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_refinement_follows_every_method_and_keeps_its_zeros(name: str, sparsity) -> None:
    plain = packed_layers(compress(tiny.build("llama"), settings(name, sparsity)))
    model = compress(tiny.build("llama"), settings(name, sparsity, refine="tm+distill"))
    report, pattern = model.sparselr_report, parse(sparsity) if METHODS[name].sparse else EMPTY
    assert all(row["tm"]["loss_after"] < row["tm"]["loss_before"] for row in report.blocks)
    assert report.distill["loss_after"] < report.distill["loss_before"]
    assert all({"iterations", "converged", "objective", "seconds"} <= row.keys() for row in report.layers)
    for key, layer in packed_layers(model).items():
        mask = unpack_mask(layer.mask, layer.in_features)
        S = unpack(layer.mask, layer.values, layer.in_features)
        assert int(mask.sum()) == pattern.kept(mask.shape) and pattern.allows(mask) and not S[~mask].any()
        if key == "model.layers.0.self_attn.q_proj":  # both runs solve it for the same inputs
            before = plain[key]
            assert torch.equal(layer.mask, before.mask)
            pairs = list(zip(layer.factors, before.factors, strict=True))
            assert bool(pairs) == METHODS[name].low_rank
            pairs += [(layer.values, before.values)] * METHODS[name].sparse
            assert not any(torch.equal(*pair) for pair in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_agrees_with_the_cpu(name: str, sparsity) -> None:
    weight, gram = problem(48, 64)
    H = gram.matrix * gram.scale[:, None] * gram.scale
    found = [solve(name, weight.to(device), ScaledGram(H.to(device)), sparsity) for device in ("cpu", "cuda")]
    assert found[1].S.is_cuda
    here, there = (result.stats["objective"] for result in found)
    assert there == pytest.approx(here, rel=0.05)  # rounding alone may end 4% away
