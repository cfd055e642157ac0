"""Methods with a low-rank step against float64 references, planted decompositions and cases done by hand."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch
from helpers.layer_problems import PATTERNS, TWO_OF_FOUR, diagonal_gram, problem
from helpers.layer_references import fit_error, in_scale, least_error, objective, truncated

from hf_sparselr.format.patterns import NM, Unstructured
from hf_sparselr.solvers import eora, hassle_free, oats, sslc, svd
from hf_sparselr.solvers.alternating import alternate, settled
from hf_sparselr.solvers.base import exact_basis, scaled
from hf_sparselr.solvers.gram import ScaledGram, squared_error
from hf_sparselr.solvers.pruners import PRUNERS
from hf_sparselr.utils.validation import build_options

FAST_ALPS = {"max_iterations": 15, "cg_steps": 5}
SPARSE = {
    **{f"eora-{name}": (eora, eora.Options(name)) for name in PRUNERS},
    "hassle-free-sparsegpt": (hassle_free, hassle_free.SparseGPTOptions(iterations=6)),
    "hassle-free-alps": (hassle_free, hassle_free.ALPSOptions(iterations=4, pruner_options=FAST_ALPS)),
    "oats": (oats, oats.Options(iterations=12)),
    "oats-layer": (oats, oats.Options(iterations=12, compare="layer", svd="exact")),
    "sslc": (sslc, sslc.Options(iterations=12)),
    "sslc-row": (sslc, sslc.Options(iterations=12, compare="row")),
}
HASSLE_FREE = ["hassle-free-sparsegpt", "hassle-free-alps"]
ALTERNATING = [*HASSLE_FREE, "sslc"]


def solve(name: str, weight: torch.Tensor, gram: ScaledGram, pattern, rank: int, seed: int = 0):
    module, options = SPARSE[name]
    return module.solve(weight, gram, pattern, rank, options, seed=seed)


# Every method with a sparse part


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rank", [0, 3])
def test_obeys_the_pattern_and_reports_its_objective(name: str, pattern, rank: int) -> None:
    out, n = 13, pattern.m * 3 if isinstance(pattern, NM) else 37
    weight, gram = problem(out, n)
    result = solve(name, weight, gram, pattern, rank)
    assert int(result.mask.sum()) == pattern.kept((out, n)) and pattern.allows(result.mask)
    assert not result.S[~result.mask].any()
    assert result.S.shape == (out, n) and result.S.dtype == torch.float32 and result.mask.dtype == torch.bool
    if rank:
        assert result.A.shape == (rank, n) and result.B.shape == (out, rank)
    else:
        assert result.A is None and result.B is None
    whole = squared_error(in_scale(weight, gram), gram.matrix.double())
    assert result.stats["objective"] == pytest.approx(objective(weight, result, gram), rel=1e-3, abs=1e-9 * whole)
    assert type(result.stats["iterations"]) is int and type(result.stats["converged"]) is bool
    assert json.loads(json.dumps(result.stats)) == result.stats


@pytest.mark.parametrize("name", SPARSE)
def test_leaves_its_inputs_alone_and_is_deterministic(name: str) -> None:
    weight, gram = problem(10, 16)
    before = weight.clone(), gram.matrix.clone()

    torch.manual_seed(1)
    first = solve(name, weight, gram, TWO_OF_FOUR, 3, seed=5)
    torch.manual_seed(2)
    again = solve(name, weight, gram, TWO_OF_FOUR, 3, seed=5)
    for field in ("S", "mask", "A", "B"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    for field in ("iterations", "converged", "objective"):
        assert first.stats[field] == again.stats[field]
    assert torch.equal(weight, before[0]) and torch.equal(gram.matrix, before[1])


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.6)], ids=str)
def test_a_larger_rank_helps(name: str, pattern) -> None:
    weight, gram = problem(24, 32)
    found = [objective(weight, solve(name, weight, gram, pattern, rank), gram) for rank in (0, 2, 8)]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("rank", [0, 2])
def test_dead_inputs_get_no_weight(name: str, rank: int) -> None:
    weight, gram = problem(8, 16)
    H, dead = gram.matrix.clone(), [2, 3, 9]
    H[dead], H[:, dead] = 0, 0
    gram = ScaledGram(H)
    result = solve(name, weight, gram, TWO_OF_FOUR, rank)
    assert not result.dense()[:, dead].any() and not result.S[:, dead].any()
    assert (result.mask.reshape(-1, 4).sum(1) == 2).all()
    changed = weight.clone()
    changed[:, dead] += 1e3  # what a dead input weighs cannot matter
    assert torch.equal(result.dense(), solve(name, changed, gram, TWO_OF_FOUR, rank).dense())


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("shape", [(8, 32), (40, 32)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_more_inputs_than_tokens_without_damping(name: str, shape: tuple[int, int], tokens: int) -> None:
    weight, gram = problem(*shape, tokens=tokens, damping=(0.0, 0.0))
    result = solve(name, weight, gram, TWO_OF_FOUR, 3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (result.S, result.A, result.B))
    assert int(result.mask.sum()) == TWO_OF_FOUR.kept(shape)
    pruned = scaled(weight, gram) * (1 - TWO_OF_FOUR.mask(scaled(weight, gram).abs()).float())
    assert result.stats["objective"] < squared_error(pruned, gram.matrix)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("rank", [0, 2])
def test_nothing_to_do(name: str, rank: int) -> None:
    weight, gram = problem(8, 16)
    kept = solve(name, weight, gram, Unstructured(0.0), rank)
    torch.testing.assert_close(kept.dense(), weight, rtol=1e-4, atol=1e-5)
    zero = solve(name, torch.zeros(8, 16), gram, TWO_OF_FOUR, rank)
    assert torch.equal(zero.dense(), torch.zeros(8, 16)) and zero.stats["objective"] == 0
    dead = solve(name, weight, ScaledGram(torch.zeros(16, 16)), TWO_OF_FOUR, rank)
    assert torch.equal(dead.dense(), torch.zeros(8, 16))


def planted() -> torch.Tensor:
    """Ones, and one entry of another size in every row and every group of four."""
    weight = torch.ones(8, 8)
    for row in range(8):
        weight[row, row % 4], weight[row, 4 + (row + 1) % 4] = 5.0, -3.0
    return weight


@pytest.mark.parametrize("pattern", [NM(1, 4), Unstructured(0.75)], ids=str)
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (oats, oats.Options()),
        (oats, oats.Options(svd="exact", compare="layer")),
        (sslc, sslc.Options()),
        (hassle_free, hassle_free.SparseGPTOptions()),
        (hassle_free, hassle_free.ALPSOptions(iterations=30)),
    ],
)
def test_recovers_a_planted_decomposition(pattern, module, options) -> None:
    result = module.solve(planted(), diagonal_gram(*[1.0] * 8), pattern, 1, options)
    torch.testing.assert_close(result.B @ result.A, torch.ones(8, 8), rtol=0, atol=2e-3)
    torch.testing.assert_close(result.S, planted() - torch.ones(8, 8), rtol=0, atol=2e-3)
    assert result.stats["objective"] < 1e-3


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.7)], ids=str)
def test_order_of_the_methods(pattern) -> None:
    """With correlated inputs, over three layers: hassle-free-alps < hassle-free-sparsegpt < oats < eora."""
    found = dict.fromkeys((*HASSLE_FREE, "oats", "eora-wanda"), 0.0)
    for name, seed in itertools.product(found, range(3)):
        weight, gram = problem(48, 64, seed)
        module, options = SPARSE[name]
        options = options if module is eora else replace(options, iterations=40)
        found[name] += module.solve(weight, gram, pattern, 4, options).stats["objective"]
    assert found["hassle-free-alps"] < found["hassle-free-sparsegpt"] < found["oats"] < found["eora-wanda"]


# HASSLE-free and the alternation


@pytest.mark.parametrize("name", HASSLE_FREE)
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.6)], ids=str)
def test_hassle_free_starts_at_eora_and_never_ends_above_it(name: str, pattern) -> None:
    weight, gram = problem(24, 32)
    options = SPARSE[name][1]
    single = eora.Options(options.pruner, options.pruner_options)
    start = eora.solve(weight, gram, pattern, 3, single)

    def run(iterations: int):
        return hassle_free.solve(weight, gram, pattern, 3, replace(options, iterations=iterations))

    assert torch.equal(run(1).dense(), start.dense())
    found = [run(iterations).stats["objective"] for iterations in range(1, 8)]
    assert found[0] == start.stats["objective"]
    assert all(after <= before for before, after in itertools.pairwise(found))
    assert found[-1] < 0.97 * found[0]


@pytest.mark.parametrize("name", HASSLE_FREE)
@pytest.mark.parametrize("shape", [(12, 24), (24, 12)])
def test_hassle_free_low_rank_part_is_optimal_given_s(name: str, shape: tuple[int, int]) -> None:
    weight, gram = problem(*shape)
    result = solve(name, weight, gram, TWO_OF_FOUR, 3)
    E = in_scale(weight.double() - result.S.double(), gram)
    assert objective(weight, result, gram) == pytest.approx(least_error(E, gram, 3), rel=1e-4)


@pytest.mark.parametrize("name", ALTERNATING)
def test_nothing_alternates_at_rank_0(name: str) -> None:
    weight, gram = problem(8, 16)
    stats = solve(name, weight, gram, TWO_OF_FOUR, 0).stats
    assert stats["iterations"] == stats["best_iteration"] == 1 and stats["converged"]


def test_alternation_that_no_longer_moves_has_converged() -> None:
    weight, gram = problem(6, 8)
    Wt, mask = scaled(weight, gram), TWO_OF_FOUR.mask(weight.abs())
    fit = exact_basis(Wt * ~mask, gram, 2)
    stats = alternate(Wt, gram, 2, 3, lambda _: (Wt * mask, mask), lambda *_: fit)[-1]
    assert stats["converged"] and stats["iterations"] == 3 and stats["best_iteration"] == 1


def test_alternation_keeps_the_best_iterate() -> None:
    """A prune step that gets worse: the second of four iterates is the best."""
    weight, gram = problem(6, 8)
    Wt, kept = scaled(weight, gram), iter((3, 8, 5, 1))

    def prune(target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (torch.arange(8) < next(kept)).expand(6, 8)
        return target * mask, mask

    S, mask, basis, stats = alternate(Wt, gram, 2, 4, prune, lambda error, _: exact_basis(error, gram, 2))
    assert stats["iterations"] == 4 and stats["best_iteration"] == 2 and not stats["converged"]
    assert mask.all() and stats["objective"] == pytest.approx(fit_error(Wt - S, gram, basis), abs=1e-6)


@pytest.mark.parametrize(
    ("last", "error", "expected"),
    [
        (float("inf"), 1.0, False),
        (1.0, 0.9, False),
        (1.0, 0.9995, True),
        (1.0, 1.0005, True),
        (0.0, 0.0, True),
    ],
)
def test_settled(last: float, error: float, expected: bool) -> None:
    assert settled(last, error) is expected


# OATS


@pytest.mark.parametrize("compare", ["row", "layer"])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.75)], ids=str)
@pytest.mark.parametrize("shape", [(12, 24), (24, 12)])
def test_oats_takes_the_published_steps(compare: str, pattern, shape: tuple[int, int]) -> None:
    """Five iterations of Algorithm 1 with full SVDs and sorts, float64."""
    weight, gram = problem(*shape)
    WD, S = scaled(weight, gram).double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(5):
        L = truncated(WD - S, 3)
        R = WD - L
        if isinstance(pattern, NM):
            groups = R.abs().reshape(-1, 4)
            cut = groups.sort(1, descending=True).values[:, 1:2].expand_as(groups).reshape(shape)
        elif compare == "row":
            cut = R.abs().sort(1, descending=True).values[:, shape[1] // 4 - 1 : shape[1] // 4]
        else:
            cut = R.abs().flatten().sort(descending=True).values[R.numel() // 4 - 1]
        S = R * (R.abs() >= cut)
    result = oats.solve(weight, gram, pattern, 3, oats.Options(iterations=5, compare=compare, svd="exact"))
    assert torch.equal(result.mask, S != 0)
    torch.testing.assert_close(in_scale(result.S, gram), S, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(in_scale(result.B @ result.A, gram), L, rtol=1e-3, atol=1e-4)
    assert result.stats["scaled_error"] == pytest.approx(float((WD - S - L).square().sum()), rel=1e-4)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.6)], ids=str)
@pytest.mark.parametrize("compare", ["row", "layer"])
def test_oats_subspace_steps_end_where_exact_svds_do(pattern, compare: str) -> None:
    """Local optima of single layers differ, their mean does not."""
    ratios = []
    for seed in range(6):
        weight, gram = problem(32, 48, seed)
        subspace, exact = (
            oats.solve(weight, gram, pattern, 4, oats.Options(compare=compare, svd=name)).stats["scaled_error"]
            for name in ("subspace", "exact")
        )
        ratios.append(subspace / exact)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("method", ["exact", "subspace"])
def test_oats_own_error_falls_in_every_iteration_until_it_settles(method: str) -> None:
    weight, gram = problem(16, 24)
    runs = [
        oats.solve(weight, gram, TWO_OF_FOUR, 3, oats.Options(iterations=n, svd=method)).stats
        for n in (1, 2, 4, 8, 16, 400)
    ]
    assert all(after["scaled_error"] < before["scaled_error"] for before, after in itertools.pairwise(runs))
    assert [stats["converged"] for stats in runs] == [False] * 5 + [True]


def test_oats_sees_the_size_of_inputs_only() -> None:
    weight, gram = problem(12, 16)
    H = gram.matrix * gram.scale[:, None] * gram.scale
    uncorrelated = ScaledGram(torch.diag(H.diagonal()))
    first, second = (oats.solve(weight, g, TWO_OF_FOUR, 2, oats.Options()) for g in (ScaledGram(H), uncorrelated))
    torch.testing.assert_close(first.dense(), second.dense())
    assert first.stats["objective"] != pytest.approx(second.stats["objective"], rel=0.01)


# SSLC


def test_sslc_never_prunes_the_important_weights() -> None:
    weight, gram = problem(24, 32)
    important = Unstructured(0.55).mask(scaled(weight, gram).abs())
    kept, free = (
        sslc.solve(weight, gram, Unstructured(0.5), 4, sslc.Options(important=share)).mask[important]
        for share in (0.45, 0.0)
    )
    assert kept.all() and not free.all()


@pytest.mark.parametrize("pattern", [NM(1, 4), TWO_OF_FOUR, Unstructured(0.6)], ids=str)
def test_sslc_keeps_the_first_of_too_many_important_weights(pattern) -> None:
    weight, gram = problem(24, 32)
    result = sslc.solve(weight, gram, pattern, 4, sslc.Options(important=1.0))
    assert torch.equal(result.mask, pattern.mask(scaled(weight, gram).abs()))


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.6)], ids=str)
def test_sslc_low_rank_part_is_near_optimal_given_s(pattern) -> None:
    weight, gram = problem(24, 32)
    result = sslc.solve(weight, gram, pattern, 3, sslc.Options())
    best = least_error(in_scale(weight.double() - result.S.double(), gram), gram, 3)
    assert 1 - 1e-4 < objective(weight, result, gram) / best < 1.01


def test_sslc_first_prune_step_is_wanda_and_the_sketch_depends_on_the_seed() -> None:
    weight, gram = problem(12, 16)
    first, other = (sslc.solve(weight, gram, TWO_OF_FOUR, 3, sslc.Options(iterations=1), seed=seed) for seed in (0, 1))
    wanda = TWO_OF_FOUR.mask(scaled(weight, gram).abs())
    torch.testing.assert_close(first.S, weight * wanda)
    assert torch.equal(first.S, other.S) and not torch.equal(first.A, other.A)


# Options


@pytest.mark.parametrize(
    "options",
    [
        svd.Options(),
        eora.Options(),
        eora.Options("alps", {"rho": 0.2, "growth": [1.5, 1.2, 1.1]}),
        hassle_free.SparseGPTOptions(iterations=3, pruner_options={"block": 64}),
        hassle_free.ALPSOptions(),
        oats.Options(iterations=2, compare="layer", svd="exact"),
        sslc.Options(important=0.0),
    ],
)
def test_options_survive_json(options) -> None:
    stored = json.loads(json.dumps(asdict(options)))
    again = build_options("method_options", stored, type(options))
    assert again == options and type(again) is type(options)


@pytest.mark.parametrize(
    ("kind", "field", "value", "error", "allowed"),
    [
        (eora.Options, "pruner", "sgpt", ValueError, "'sparsegpt', 'alps'"),
        (eora.Options, "pruner_options", 3, TypeError, "a dict or"),
        (hassle_free.ALPSOptions, "iterations", 0, ValueError, ">= 1"),
        (hassle_free.ALPSOptions, "pruner_options", "x", TypeError, "a dict or"),
        (oats.Options, "iterations", 1.5, TypeError, ">= 1"),
        (oats.Options, "compare", "column", ValueError, "'row', 'layer'"),
        (oats.Options, "svd", "random", ValueError, "'subspace', 'exact'"),
        (sslc.Options, "iterations", 0, ValueError, ">= 1"),
        (sslc.Options, "important", -0.1, ValueError, "[0, 1]"),
        (sslc.Options, "important", 1.5, ValueError, "[0, 1]"),
        (sslc.Options, "important", "1%", TypeError, "[0, 1]"),
        (sslc.Options, "compare", None, ValueError, "'row', 'layer'"),
    ],
)
def test_options_name_field_value_and_allowed(kind, field: str, value, error: type, allowed: str) -> None:
    with pytest.raises(error) as caught:
        kind(**{field: value})
    assert f"method_options.{field}={value!r}" in str(caught.value) and allowed in str(caught.value)


@pytest.mark.parametrize("kind", [eora.Options, hassle_free.SparseGPTOptions])
def test_options_of_the_pruner_are_checked(kind) -> None:
    with pytest.raises(TypeError, match=r"method_options\.pruner_options has no field 'blok'; did you mean 'block'"):
        kind(pruner_options={"blok": 64})
    with pytest.raises(ValueError, match=r"method_options\.block=0"):
        kind(pruner_options={"block": 0})
