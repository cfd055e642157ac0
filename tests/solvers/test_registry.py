"""Layers of any size: methods give the same result in other units, and name what is wrong with unsolvable ones."""

import pytest
import torch
from helpers import tiny
from helpers.layer_problems import problem

from hf_sparselr.format.patterns import EMPTY, parse
from hf_sparselr.solvers.gram import ScaledGram
from hf_sparselr.solvers.registry import METHODS, PRECOMPUTED

NAMES = [name for name in METHODS if name != PRECOMPUTED]
QUICK = {
    "3basil": tiny.FAST,
    "oats": {"iterations": 4},
    "sslc": {"iterations": 4},
    "hassle-free-sparsegpt": {"iterations": 2},
    "hassle-free-alps": {"iterations": 2, "pruner_options": {"max_iterations": 12}},
    "alps": {"max_iterations": 12},
}


def solve(name: str, weight: torch.Tensor, gram: ScaledGram):
    method = METHODS[name]
    pattern, rank = parse("2:4") if method.sparse else EMPTY, 3 if method.low_rank else 0
    return method.solve(weight, gram, pattern, rank, method.options(**QUICK.get(name, {})))


@pytest.mark.parametrize("power", [-50, -10, 10, 40])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_in_other_units_is_the_same_layer(name: str, power: int) -> None:
    """To the bit. Squares of squares of the large ones overflow FP32; low-rank parts got lost that way."""
    weight, gram = problem(12, 16)
    plain, large = solve(name, weight, gram), solve(name, weight * 4.0**power, gram)
    assert torch.equal(large.mask, plain.mask) and torch.equal(large.S, plain.S * 4.0**power)
    for ours, theirs in ((large.A, plain.A), (large.B, plain.B)):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs * 2.0**power)
    assert large.stats["objective"] == plain.stats["objective"] * 16.0**power


@pytest.mark.parametrize("name", ["3basil", "svd", "wanda"])
def test_what_cannot_be_solved_is_a_plain_error(name: str) -> None:
    weight, gram = problem(12, 16)
    H = gram.matrix * gram.scale[:, None] * gram.scale
    for bad in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[3, 5] = bad
        with pytest.raises(ValueError, match="weight holds NaN or Inf"):
            solve(name, broken, gram)
    with pytest.raises(ValueError, match=r"weight times the size of its inputs overflows FP32"):
        solve(name, weight * 3e37, gram)
    with pytest.raises(ValueError, match="sum of their squares overflows FP32"):
        solve(name, weight, ScaledGram(H * (3e38 / H.diagonal().max())))
