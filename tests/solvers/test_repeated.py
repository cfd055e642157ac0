"""What solvers keep between calls: every result is, to the bit, what new objects give."""

from dataclasses import replace

import pytest
import torch
from helpers.layer_problems import TWO_OF_FOUR, problem, randn

from hf_sparselr.format.patterns import NM, Pattern, Unstructured
from hf_sparselr.solvers import gram as gram_module
from hf_sparselr.solvers import hassle_free
from hf_sparselr.solvers.alternating import alternate
from hf_sparselr.solvers.base import exact_basis, scaled, unscale
from hf_sparselr.solvers.gram import ScaledGram
from hf_sparselr.solvers.pruners import PRUNERS
from hf_sparselr.solvers.threebasil.admm import Admm

NAMES = [name for name, pruner in PRUNERS.items() if pruner.repeated]
PATTERNS = [TWO_OF_FOUR, NM(5, 7), Unstructured(0.6)]


def new_gram(device: str = "cpu") -> ScaledGram:
    gram = problem(9, 56)[1]
    return ScaledGram((gram.matrix * gram.scale[:, None] * gram.scale).to(device))


def weights(count: int, device: str = "cpu") -> list[torch.Tensor]:
    """Scaled, (9, 56)."""
    return [scaled(randn(9, 56, seed=seed).float().to(device), new_gram(device)) for seed in range(count)]


# Pruners


def test_the_pruners_of_hassle_free_can_be_repeated() -> None:
    assert NAMES == ["sparsegpt", "alps"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_repeated_pruner_gives_what_a_new_one_does(name: str, pattern: Pattern, rounding: None) -> None:
    options = PRUNERS[name].options()
    again = PRUNERS[name].repeated(new_gram(), pattern, options)
    given = weights(4)
    found = [again(Wt) for Wt in given]
    assert all(map(torch.equal, given, weights(4)))
    for Wt, (S, mask) in zip(given, found, strict=True):  # no call changed the results of one before
        expected = PRUNERS[name].prune(Wt, new_gram(), pattern, options)
        assert torch.equal(S, expected[0]) and torch.equal(mask, expected[1])
        assert S.is_contiguous() and mask.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8), (6, 1), (1, 1)])
def test_thin_weights_stay_as_they_are(name: str, shape: tuple[int, int]) -> None:
    weight, gram = problem(*shape)
    again = PRUNERS[name].repeated(gram, Unstructured(0.5), PRUNERS[name].options())
    for Wt in (scaled(weight, gram), scaled(2 * weight, gram)):
        before = Wt.clone()
        S, mask = again(Wt)
        assert torch.equal(Wt, before) and int(mask.sum()) == Unstructured(0.5).kept(shape)
        assert S.shape == mask.shape == shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_hassle_free_alternates_as_with_new_pruners(name: str, pattern: Pattern) -> None:
    kinds = {"sparsegpt": hassle_free.SparseGPTOptions, "alps": hassle_free.ALPSOptions}
    weight, options, gram = randn(9, 56).float(), kinds[name](iterations=5), new_gram()
    result = hassle_free.solve(weight, gram, pattern, 3, options)
    Wt = scaled(weight, gram)
    S, mask, basis, stats = alternate(
        Wt,
        gram,
        3,
        5,
        prune=lambda target: PRUNERS[name].prune(target, new_gram(), pattern, options.pruner_options)[:2],
        fit=lambda error, _: exact_basis(error, new_gram(), 3),
    )
    expected = unscale(S, mask, basis, Wt - S, gram)
    assert result.stats == stats
    for field in ("S", "mask", "A", "B"):
        assert torch.equal(getattr(result, field), getattr(expected, field))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_replayed_graphs_give_what_single_kernels_do(name: str, pattern: Pattern) -> None:
    options = PRUNERS[name].options()
    again = PRUNERS[name].repeated(new_gram("cuda"), pattern, options)
    given = weights(4, "cuda")
    found = [again(Wt) for Wt in given]
    for Wt, (S, mask) in zip(given, found, strict=True):
        expected = PRUNERS[name].prune(Wt, new_gram("cuda"), pattern, options)
        assert torch.equal(mask, expected[1])
        torch.testing.assert_close(S, expected[0], rtol=1e-4, atol=1e-4)


# The iteration


def state(run: Admm) -> list[torch.Tensor]:
    bases = [layer.basis for layer in run.layers if layer.rank]
    return [run.W, run.T, run.mask, run.L, run.M, run._rho, torch.tensor(run.rho), *bases]


@pytest.mark.parametrize("ranks", [(0, 0), (3, 0), (2, 4)])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_retargeted_iteration_is_a_new_one(ranks: tuple[int, int], pattern: Pattern) -> None:
    first, second, third, fourth = weights(4)
    patterns = [pattern, Unstructured(0.5)]

    def start(given: list[torch.Tensor]) -> Admm:
        return Admm(given, new_gram(), patterns, list(ranks), 0.1, 7, "fp32")

    run = start([first, second])
    run.run(5)
    run.raise_rho(1.3)
    run.run(3)
    run.retarget([third, fourth], 0.1)
    fresh = start([third, fourth])
    for steps, factor in ((0, 1.0), (4, 1.05), (3, 1.3), (6, 1.0)):
        for each in (run, fresh):
            each.run(steps)
            each.raise_rho(factor)
        assert all(map(torch.equal, state(run), state(fresh)))


# Inverses


@pytest.mark.parametrize("kept", [0, 1, 2, 10])
def test_kept_inverses_are_those_of_a_new_gram(kept: int, monkeypatch) -> None:
    monkeypatch.setattr(gram_module, "KEPT_INVERSES", kept * 56 * 56)
    gram, rhos = new_gram(), (0.1, 0.13, 0.2)
    expected = {rho: new_gram().inverse(rho) for rho in rhos}
    for rho in rhos * 3:
        assert torch.equal(gram.inverse(rho), expected[rho])
        gram.inverse(rho).zero_()  # the caller's own
    made = []
    monkeypatch.setattr(gram, "_inverse", lambda rho, rounded: made.append(rho) or expected[rho])
    for rho in rhos:
        gram.inverse(rho)
    assert made == list(rhos[kept:])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_iteration_leaves_kept_inverses_alone(pattern: Pattern) -> None:
    gram = new_gram()
    run = Admm(weights(1), gram, [pattern], [0], 0.1, 0, "fp32")
    for factor in (1.3, 1.05, 1.3):
        run.run(2)
        run.raise_rho(factor)
    for rho in (0.1, 0.1 * 1.3):
        assert torch.equal(gram.inverse(rho), new_gram().inverse(rho))


def test_solving_again_with_the_same_gram_changes_nothing() -> None:
    gram, weight = new_gram(), randn(9, 56).float()
    options = replace(hassle_free.ALPSOptions(), iterations=3)
    first, second = (hassle_free.solve(weight, gram, TWO_OF_FOUR, 2, options) for _ in "ab")
    assert torch.equal(first.S, second.S) and torch.equal(first.B, second.B)
