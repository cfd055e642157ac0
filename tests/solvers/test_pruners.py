"""The pruners against their own metric, brute force and naive float64 references."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers.layer_problems import PATTERNS, TWO_OF_FOUR, diagonal_gram, problem, randn

from hf_sparselr.format.patterns import NM, Unstructured, project
from hf_sparselr.solvers import alps, magnitude, sparsegpt, wanda
from hf_sparselr.solvers.base import scaled
from hf_sparselr.solvers.gram import ScaledGram, squared_error
from hf_sparselr.solvers.pruners import PRUNERS
from hf_sparselr.solvers.registry import METHODS
from hf_sparselr.solvers.threebasil.method import refine_on_support
from hf_sparselr.utils.validation import build_options

NAMES = list(PRUNERS)


def timeless(stats: dict) -> dict:
    return {name: value for name, value in stats.items() if name != "phases"}


def run(name: str, weight: torch.Tensor, gram: ScaledGram, pattern, **options):
    pruner = PRUNERS[name]
    return pruner.prune(scaled(weight, gram), gram, pattern, pruner.options(**options))


# Every pruner


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exact_counts_and_zeros(name: str, pattern) -> None:
    out, n = 13, pattern.m * 3 if isinstance(pattern, NM) else 37
    weight, gram = problem(out, n)
    Wt = scaled(weight, gram)
    S, mask, stats = run(name, weight, gram, pattern)
    error = (Wt - S).double()
    assert S.shape == mask.shape == (out, n) and S.dtype == torch.float32 and mask.dtype == torch.bool
    assert int(mask.sum()) == pattern.kept((out, n)) and pattern.allows(mask)
    assert not S[~mask].any() and S[mask].all()
    assert stats["objective"] == pytest.approx(squared_error(error, gram.matrix.double()), rel=1e-3)
    assert type(stats["iterations"]) is int and type(stats["converged"]) is bool
    assert json.loads(json.dumps(stats)) == stats


@pytest.mark.parametrize("name", NAMES)
def test_leaves_its_inputs_alone_and_is_deterministic(name: str) -> None:
    weight, gram = problem(8, 32)
    Wt = scaled(weight, gram)
    before = Wt.clone(), gram.matrix.clone()
    for pattern in (TWO_OF_FOUR, Unstructured(0.6)):
        options = PRUNERS[name].options()
        torch.manual_seed(1)
        S, mask, stats = PRUNERS[name].prune(Wt, gram, pattern, options)
        torch.manual_seed(2)
        again = PRUNERS[name].prune(Wt, gram, pattern, options)
        assert torch.equal(S, again[0]) and torch.equal(mask, again[1])
        assert timeless(stats) == timeless(again[2])
    assert torch.equal(Wt, before[0]) and torch.equal(gram.matrix, before[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.5), Unstructured(0.1)], ids=str)
def test_dead_inputs_get_no_weight(name: str, pattern) -> None:
    X = randn(200, 16)
    X[:, [2, 3, 9]] = 0
    gram = ScaledGram((X.T @ X).float())
    weight = randn(8, 16, seed=1).float()
    solve, options = METHODS[name].solve, PRUNERS[name].options()
    result = solve(weight, gram, pattern, 0, options)
    assert not result.S[:, [2, 3, 9]].any()
    assert int(result.mask.sum()) == pattern.kept((8, 16)) and pattern.allows(result.mask)
    weight[:, [2, 3, 9]] += 1e3  # what a dead input weighs cannot matter
    assert torch.equal(result.S, solve(weight, gram, pattern, 0, options).S)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 5, 31])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.5), Unstructured(0.9)], ids=str)
def test_more_inputs_than_tokens_without_damping(name: str, tokens: int, pattern) -> None:
    weight, gram = problem(8, 64, tokens=tokens, damping=(0.0, 0.0))
    S, mask, stats = run(name, weight, gram, pattern)
    largest = scaled(weight, gram).abs().max()
    assert bool(torch.isfinite(S).all()) and S.abs().max() < 1e3 * largest
    assert int(mask.sum()) == pattern.kept((8, 64)) and not S[~mask].any()
    if name in ("sparsegpt", "alps"):  # they make up for what is removed
        assert stats["objective"] < run("wanda", weight, gram, pattern)[2]["objective"]


@pytest.mark.parametrize("name", NAMES)
def test_all_inputs_dead_or_all_weights_zero(name: str) -> None:
    dead, (_, gram) = ScaledGram(torch.zeros(8, 8)), problem(4, 8)
    for pattern in (TWO_OF_FOUR, Unstructured(0.4)):
        for weight, G in ((randn(4, 8), dead), (torch.zeros(4, 8), gram)):
            S, mask, stats = run(name, weight, G, pattern)
            assert not S.any() and stats["objective"] == 0
            assert int(mask.sum()) == pattern.kept((4, 8))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_remove_changes_nothing(name: str) -> None:
    weight, gram = problem(5, 11)
    S, mask, _ = run(name, weight, gram, Unstructured(0.0))
    assert mask.all()
    torch.testing.assert_close(S, scaled(weight, gram), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, NM(1, 4), Unstructured(0.5), Unstructured(0.7)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_methods(pattern, seed: int) -> None:
    weight, gram = problem(48, 64, seed)
    found = {name: run(name, weight, gram, pattern)[2]["objective"] for name in NAMES}
    assert found["alps"] < 0.95 * found["sparsegpt"] < 0.95 * found["wanda"]


# Magnitude and Wanda


def test_magnitude_ignores_the_inputs() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.1, 0.2, -0.3, 0.4]])
    gram = diagonal_gram(1.0, 1.0, 100.0, 10000.0)
    S, mask, _ = run("magnitude", weight, gram, TWO_OF_FOUR)
    assert mask.tolist() == [[True, True, False, False], [False, False, True, True]]
    torch.testing.assert_close(S / gram.scale, weight * mask)
    assert run("magnitude", weight, gram, Unstructured(0.5))[1].tolist() == [[True] * 4, [False] * 4]


def test_wanda_weighs_by_the_size_of_the_inputs() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.1, 0.2, -0.3, 0.4]])
    gram = diagonal_gram(1.0, 1.0, 100.0, 10000.0)  # norms 1, 1, 10, 100
    S, mask, stats = run("wanda", weight, gram, Unstructured(0.5))
    assert mask.tolist() == [[False, False, True, True]] * 2
    torch.testing.assert_close(S / gram.scale, weight * mask)
    assert stats["objective"] == pytest.approx(16 + 9 + 0.01 + 0.04)
    layer = run("wanda", weight, gram, Unstructured(0.5), compare="layer")[1]
    assert layer.tolist() == [[True, False, True, True], [False, False, False, True]]
    layer = run("wanda", weight, gram, Unstructured(0.25), compare="layer")[1]
    assert layer.tolist() == [[True] * 4, [False, False, True, True]]
    row = run("wanda", weight, gram, Unstructured(0.25))[1]
    assert row.tolist() == [[True, False, True, True], [False, True, True, True]]


@pytest.mark.parametrize("compare", ["row", "layer"])
@pytest.mark.parametrize("name", ["wanda", "magnitude"])
def test_prune_step_is_optimal_for_its_metric(name: str, compare: str) -> None:
    """No kept entry of a row (of the layer) scores less than a removed one."""
    weight, gram = problem(11, 29)
    options = {"compare": compare} if name == "wanda" else {}
    _, mask, _ = run(name, weight, gram, Unstructured(0.7), **options)
    scores = scaled(weight, gram).abs() if name == "wanda" else weight.abs()
    if name == "magnitude" or compare == "layer":
        assert scores[mask].min() > scores[~mask].max()
        return
    counts = mask.sum(1)
    assert counts.max() - counts.min() == 1  # 97 kept entries over 11 rows
    for row in range(11):
        assert scores[row][mask[row]].min() > scores[row][~mask[row]].max()


@pytest.mark.parametrize("name", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", [NM(1, 4), NM(3, 8), NM(5, 7)], ids=str)
def test_groups_keep_their_n_best(name: str, pattern) -> None:
    weight, gram = problem(6, 3 * pattern.m)
    _, mask, _ = run(name, weight, gram, pattern)
    scores = scaled(weight, gram).abs() if name == "wanda" else weight.abs()
    for group, kept in zip(scores.reshape(-1, pattern.m), mask.reshape(-1, pattern.m), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(group.topk(pattern.n).indices.tolist())


# SparseGPT


def naive_obs(W: torch.Tensor, G: torch.Tensor, choose_at) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixes columns in order, each with the explicit inverse over the columns that are left, in float64.

    `choose_at(j, cost)` returns the columns to choose at column j and their mask, or None; `cost` is
    w^2 / [F^-1]_kk of a column k when every column before it is gone.
    """
    W, n = W.double().clone(), W.shape[1]
    G = G.double()
    mask = torch.zeros_like(W, dtype=torch.bool)
    inverses = [torch.linalg.inv(G[j:, j:]) for j in range(n)]
    heads = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(n):
        chosen = choose_at(j, W.square() / heads)
        if chosen is not None:
            mask[:, chosen[0]] = chosen[1]
        removed = torch.where(mask[:, j], 0.0, W[:, j])
        W[:, j + 1 :] -= removed[:, None] * (inverses[j][0, 1:] / heads[j])
        W[:, j] -= removed
    return W, mask


def by_group(pattern: NM):
    def choose(j: int, cost: torch.Tensor):
        if j % pattern.m:
            return None
        columns = slice(j, j + pattern.m)
        ranks = cost[:, columns].argsort(1, descending=True).argsort(1)
        return columns, ranks < pattern.n

    return choose


def by_block(block: int, kept: int, n: int):
    def choose(j: int, cost: torch.Tensor):
        if j % block:
            return None
        end = min(j + block, n)
        count = kept * end // n - kept * j // n
        flat = cost[:, j:end].flatten()
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[flat.argsort(descending=True)[:count]] = True
        return slice(j, end), mask.view(len(cost), -1)

    return choose


@pytest.mark.parametrize("block", [1, 3, 8, 20, 128])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, NM(1, 4), NM(5, 7)], ids=str)
def test_sparsegpt_is_sequential_obs_per_group(pattern: NM, block: int) -> None:
    weight, gram = problem(9, 8 * pattern.m)
    S, mask, stats = run("sparsegpt", weight, gram, pattern, block=block)
    expected, support = naive_obs(scaled(weight, gram), gram.matrix, by_group(pattern))
    assert torch.equal(mask, support) and stats["jitter"] == 0
    torch.testing.assert_close(S.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("block", [1, 7, 16, 45, 128])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.99])
def test_sparsegpt_is_sequential_obs_per_block(sparsity: float, block: int) -> None:
    pattern = Unstructured(sparsity)
    weight, gram = problem(9, 45)
    S, mask, _ = run("sparsegpt", weight, gram, pattern, block=block)
    kept = pattern.kept((9, 45))
    expected, support = naive_obs(scaled(weight, gram), gram.matrix, by_block(block, kept, 45))
    assert torch.equal(mask, support) and int(mask.sum()) == kept
    torch.testing.assert_close(S.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_sparsegpt_by_hand() -> None:
    """Two inputs with correlation 1/2: removing the first moves half of it to the second."""
    gram = ScaledGram(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), (0.0, 0.0))
    weight = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    S, mask, stats = run("sparsegpt", weight, gram, NM(1, 2))
    # costs: w_0^2 (1 - 1/4) against w_1^2
    assert mask.tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(S, torch.tensor([[0.0, 3.5], [3.0, 0.0]]))
    assert stats["objective"] == pytest.approx(0.75 + 1)


def test_sparsegpt_without_correlation_is_wanda() -> None:
    weight, gram = randn(6, 16).float(), diagonal_gram(*(float(j + 1) for j in range(16)))
    for pattern, options in ((TWO_OF_FOUR, {}), (Unstructured(0.6), {"compare": "layer"})):
        S, mask, _ = run("sparsegpt", weight, gram, pattern)
        expected = run("wanda", weight, gram, pattern, **options)
        assert torch.equal(mask, expected[1])
        torch.testing.assert_close(S, expected[0])


@pytest.mark.parametrize(("tokens", "least", "most"), [(400, 0, 0), (10, 1e-7, 1e-4)])
def test_inverse_factor_adds_jitter_only_to_a_singular_gram(tokens: int, least: float, most: float) -> None:
    weight, gram = problem(8, 40, tokens=tokens, damping=(0.0, 0.0))
    U, jitter = gram.inverse_factor
    assert least <= jitter <= most and torch.equal(U, U.triu()) and bool(torch.isfinite(U).all())
    if not jitter:  # else too ill-conditioned to compare
        torch.testing.assert_close(U.T @ U @ gram.matrix, torch.eye(40), rtol=0, atol=1e-3)
    assert run("sparsegpt", weight, gram, TWO_OF_FOUR)[2]["jitter"] == jitter


# ALPS


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, NM(1, 4), Unstructured(0.6)], ids=str)
def test_alps_refit_is_the_least_squares_solution_on_its_support(pattern) -> None:
    weight, gram = problem(7, 24)
    S, mask, _ = run("alps", weight, gram, pattern, cg_steps=60)
    values, vectors = torch.linalg.eigh(gram.matrix.double())
    root = (vectors * values.clamp(min=0).sqrt()).T  # root^T root = G
    target = scaled(weight, gram).double()
    for row, kept in enumerate(mask):
        exact = torch.linalg.lstsq(root[:, kept], (root @ target[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(S[row, kept].double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_alps_takes_the_published_steps(rho: float) -> None:
    """Six iterations of Algorithm 1, with rho raised after the third, solved in float64; then the refit."""
    weight, gram = problem(6, 16)
    G, Wt = gram.matrix.double(), scaled(weight, gram).double()
    D, mask = project(Wt, TWO_OF_FOUR)
    V, first, penalty = torch.zeros_like(Wt), mask, rho
    for step in range(6):
        if step == 3:
            change = int((mask != first).sum()) / int(mask.sum())
            assert change > 0
            penalty *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
        X = torch.linalg.solve(G + penalty * torch.eye(16), Wt @ G - V + penalty * D, left=False)
        D, mask = project(X + V / penalty, TWO_OF_FOUR)
        V = V + penalty * (X - D)
    S, support, stats = run("alps", weight, gram, TWO_OF_FOUR, rho=rho, max_iterations=6)
    assert stats["iterations"] == 6 and not stats["converged"] and torch.equal(support, mask)
    expected = refine_on_support(D, Wt, mask, G, 10)
    torch.testing.assert_close(S.double(), expected, rtol=1e-3, atol=1e-3)


def test_alps_converges_and_starts_again_softer_where_rho_is_too_stiff() -> None:
    weight, gram = problem(8, 16)
    stats = run("alps", weight, gram, TWO_OF_FOUR)[2]
    assert stats["converged"] and 30 <= stats["iterations"] < 300
    stats = run("alps", weight, gram, TWO_OF_FOUR, rho=50.0)[2]
    assert stats["rho"] < 50  # growth alone only raises it
    frozen = run("alps", weight, gram, TWO_OF_FOUR, rho=50.0, max_iterations=2)[2]
    assert stats["objective"] < frozen["objective"]


@pytest.mark.parametrize("tokens", [1, 5])
def test_cg_stops_where_a_singular_gram_has_no_curvature(tokens: int) -> None:
    weight, gram = problem(16, 32, tokens=tokens, damping=(0.0, 0.0))
    Wt = scaled(weight, gram)
    D, mask = project(Wt, TWO_OF_FOUR)
    error = squared_error((Wt - D).double(), gram.matrix.double())
    for steps in (tokens, 10, 200):  # a row has `tokens` directions with curvature at most
        S = refine_on_support(D, Wt, mask, gram.matrix, steps)
        assert abs(squared_error((Wt - S).double(), gram.matrix.double())) < 1e-4 * error
        assert float(S.abs().max()) < 10 * float(Wt.abs().max())


# As methods of their own


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.5)], ids=str)
def test_pruning_is_the_pruner_in_the_layers_coordinates(name: str, pattern) -> None:
    weight, gram = problem(8, 16)
    weight = weight.bfloat16()
    result = METHODS[name].solve(weight, gram, pattern, 0, PRUNERS[name].options(), seed=3)
    S, mask, stats = run(name, weight, gram, pattern)
    assert result.A is None and result.B is None and timeless(result.stats) == timeless(stats)
    assert torch.equal(result.mask, mask) and not result.S[~mask].any()
    torch.testing.assert_close(result.S * gram.scale, S)


@pytest.mark.parametrize("name", NAMES)
def test_pruning_refuses_a_rank(name: str) -> None:
    weight, gram = problem(8, 16)
    with pytest.raises(ValueError) as caught:
        METHODS[name].solve(weight, gram, TWO_OF_FOUR, 4, PRUNERS[name].options())
    message = str(caught.value)
    assert "rank=4" in message and f'method="eora", method_options={{"pruner": "{name}"}}' in message


@pytest.mark.parametrize(
    "options",
    [magnitude.Options(), wanda.Options("layer"), sparsegpt.Options(64), alps.Options(1.0, 5, (2, 1.5, 1))],
    ids=lambda options: type(options).__module__,
)
def test_options_survive_json(options) -> None:
    stored = json.loads(json.dumps(asdict(options)))
    assert build_options("method_options", stored, type(options)) == options


@pytest.mark.parametrize(
    ("kind", "field", "value", "error", "allowed"),
    [
        (wanda.Options, "compare", "column", ValueError, "'row', 'layer'"),
        (sparsegpt.Options, "block", 0, ValueError, ">= 1"),
        (sparsegpt.Options, "block", 1.5, TypeError, ">= 1"),
        (alps.Options, "rho", 0, ValueError, "> 0"),
        (alps.Options, "rho", float("inf"), ValueError, "> 0"),
        (alps.Options, "check_every", 0, ValueError, ">= 1"),
        (alps.Options, "max_iterations", True, TypeError, ">= 1"),
        (alps.Options, "cg_steps", 0, ValueError, ">= 1"),
        (alps.Options, "growth", (1.1, 1.2), TypeError, "3 numbers >= 1"),
    ],
)
def test_options_name_field_value_and_allowed(kind, field: str, value, error: type, allowed: str) -> None:
    with pytest.raises(error) as caught:
        kind(**{field: value})
    assert f"method_options.{field}={value!r}" in str(caught.value) and allowed in str(caught.value)
