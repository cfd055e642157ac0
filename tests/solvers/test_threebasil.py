"""The 3BASiL solver against brute force, exact fits and the published update, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from hf_sparselr.format.patterns import NM, Unstructured, project
from hf_sparselr.solvers.base import balanced_factors, randomized_range_finder, subspace_iteration_step
from hf_sparselr.solvers.gram import ScaledGram, squared_error
from hf_sparselr.solvers.threebasil.method import Options, refine_on_support, solve

FAST = Options(min_iterations=20, max_iterations=60)
TWO_OF_FOUR = NM(2, 4)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_matrix(n: int, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """H of correlated inputs of different sizes, FP32."""
    X = randn(tokens, n, seed=seed) @ (torch.eye(n) + 0.5 * randn(n, n, seed=seed + 1) / n**0.5)
    X = (X + 0.5 * randn(tokens, 1, seed=seed + 2)) * torch.logspace(-1, 1, n, dtype=torch.float64)
    return (X.T @ X).float()


def problem(out: int, n: int, seed: int = 0, **kwargs) -> tuple[torch.Tensor, torch.Tensor, ScaledGram]:
    H = gram_matrix(n, seed=100 + seed, **kwargs)
    return randn(out, n, seed=seed).float(), H, ScaledGram(H)


def objective(weight: torch.Tensor, result, gram: ScaledGram) -> float:
    """tr(E G E^T) in scaled coordinates, float64."""
    error = (weight.double() - result.dense().double()) * gram.scale.double()
    return squared_error(error.masked_fill(gram.dead, 0), gram.matrix.double())


def least_squares(target: torch.Tensor, mask: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """argmin over S on its support of tr((target - S) G (target - S)^T), row by row, float64."""
    S = torch.zeros_like(target)
    for row, kept in enumerate(mask):
        S[row, kept] = torch.linalg.solve(G[kept][:, kept], G[kept] @ target[row])
    return S


def exact_error(E: torch.Tensor, G: torch.Tensor, rank: int) -> float:
    """The smallest tr((E - L) G (E - L)^T) over L of that rank: the tail of the spectrum of E G^(1/2)."""
    values, vectors = torch.linalg.eigh(G)
    root = vectors * values.clamp(min=0).sqrt()
    return float(torch.linalg.svdvals(E @ root)[rank:].square().sum())


def fit_error(E: torch.Tensor, G: torch.Tensor, basis: torch.Tensor) -> float:
    return squared_error(E - basis @ (basis.T @ E), G)


# Supports


@pytest.mark.parametrize("seed", range(5))
def test_close_to_the_best_of_all_supports(seed: int) -> None:
    """Rows are independent at rank 0: the optimum over all 36 supports of each, with exact values on it."""
    rows, pairs = 64, list(itertools.combinations(range(4), 2))
    weight, _, gram = problem(rows, 8, seed)
    G, Wt = gram.matrix.double(), weight.double() * gram.scale.double()
    best = torch.full((rows,), float("inf"), dtype=torch.float64)
    for left, right in itertools.product(pairs, pairs):
        mask = torch.zeros(rows, 8, dtype=torch.bool)
        mask[:, [*left, *(4 + j for j in right)]] = True
        E = Wt - least_squares(Wt, mask, G)
        best = torch.minimum(best, ((E @ G) * E).sum(1))
    found = objective(weight, solve(weight, gram, TWO_OF_FOUR, 0, Options()), gram)
    assert 1 - 1e-5 < found / float(best.sum()) < 1.04


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.6)])
def test_refit_reaches_the_least_squares_optimum_of_its_support(pattern) -> None:
    weight, _, gram = problem(6, 16)
    result = solve(weight, gram, pattern, 0, replace(FAST, refit_rounds=3, cg_steps=40))
    target = weight.double() * gram.scale.double()
    S = least_squares(target, result.mask, gram.matrix.double()) / gram.scale.double()
    torch.testing.assert_close(result.S.double(), S, rtol=1e-3, atol=1e-4)


def test_cg_stays_on_the_support_and_every_step_helps() -> None:
    weight, _, gram = problem(6, 16)
    target = weight.double() * gram.scale.double()
    start, mask = project(target, TWO_OF_FOUR)
    G = gram.matrix.double()
    errors = [squared_error(target - start, G)]
    for steps in range(1, 9):  # eight unknowns a row: exact after eight steps
        S = refine_on_support(start, target, mask, G, steps)
        assert not S[~mask].any()
        errors.append(squared_error(target - S, G))
    assert all(after < before for before, after in itertools.pairwise(errors))
    torch.testing.assert_close(S, least_squares(target, mask, G), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_more_refit_rounds_never_hurt(rank: int) -> None:
    weight, _, gram = problem(12, 24)
    found = [
        solve(weight, gram, TWO_OF_FOUR, rank, replace(FAST, refit_rounds=rounds)).stats["objective"]
        for rounds in range(6)
    ]
    assert all(after <= before for before, after in itertools.pairwise(found))
    assert found[-1] < found[0]


# The low-rank step


@pytest.mark.parametrize("rank", [1, 3])
def test_a_subspace_iteration_step_converges_to_the_exact_fit_without_ever_losing(rank: int) -> None:
    E, G = randn(8, 12), ScaledGram(gram_matrix(12)).matrix.double()
    basis = randomized_range_finder(E.float(), G.float(), rank, seed=0).double()
    errors = [fit_error(E, G, basis)]
    for _ in range(300):
        basis = subspace_iteration_step(E, G, basis)
        errors.append(fit_error(E, G, basis))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[0] > errors[-1] == pytest.approx(exact_error(E, G, rank), rel=1e-6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))


def test_the_randomized_range_finder_depends_on_the_seed_only() -> None:
    E, G = randn(8, 12).float(), ScaledGram(gram_matrix(12)).matrix
    torch.manual_seed(1)
    first = randomized_range_finder(E, G, 3, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first, randomized_range_finder(E, G, 3, seed=0))
    assert not torch.equal(first, randomized_range_finder(E, G, 3, seed=1))
    torch.testing.assert_close(first.T @ first, torch.eye(3))


def test_balanced_factors_keep_the_product() -> None:
    basis, coefficients = torch.linalg.qr(randn(9, 3)).Q, randn(3, 7, seed=1) * 100
    A, B = balanced_factors(basis, coefficients)
    torch.testing.assert_close(B @ A, basis @ coefficients)
    torch.testing.assert_close(torch.linalg.svdvals(A), torch.linalg.svdvals(B))


# The ADMM


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_takes_the_published_steps(rank: int, rho: float) -> None:
    """Seven iterations with X = (G + rho I)^-1 (G (Wt - L) - V + rho D), solved in float64."""
    weight, _, gram = problem(6, 16)
    G, Wt = gram.matrix.double(), weight.double() * gram.scale.double()
    D, _ = project(Wt, TWO_OF_FOUR)
    V, L = torch.zeros_like(Wt), torch.zeros_like(Wt)
    if rank:
        basis = randomized_range_finder((Wt - D).float(), gram.matrix, rank, seed=0).double()
        coefficients = basis.T @ (Wt - D)
    for _ in range(7):
        right = (Wt - L) @ G - V + rho * D
        X = torch.linalg.solve(G + rho * torch.eye(16), right, left=False)
        D, mask = project(X + V / rho, TWO_OF_FOUR)
        if rank:
            basis = torch.linalg.qr((Wt - X) @ G @ coefficients.T).Q
            coefficients = basis.T @ (Wt - X)
            L = basis @ coefficients
        V = V + rho * (X - D)
    options = Options(rho=rho, min_iterations=7, max_iterations=7, refit_rounds=0)
    result = solve(weight, gram, TWO_OF_FOUR, rank, options)
    assert result.stats["iterations"] == 7
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.S.double() * gram.scale.double(), D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, NM(1, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.73)])
@pytest.mark.parametrize("rank", [0, 4])
def test_result_obeys_the_pattern(pattern, rank: int) -> None:
    weight, _, gram = problem(16, 32)
    result = solve(weight, gram, pattern, rank, FAST)
    assert pattern.allows(result.mask)
    assert int(result.mask.sum()) == pattern.kept((16, 32))
    assert not result.S[~result.mask].any()
    assert result.S.dtype == torch.float32 and result.mask.dtype == torch.bool
    if rank:
        assert result.A.shape == (rank, 32) and result.B.shape == (16, rank)
    else:
        assert result.A is None and result.B is None
    assert result.stats["objective"] == pytest.approx(objective(weight, result, gram), rel=1e-3)
    assert result.stats.keys() == {"iterations", "converged", "rho", "precision", "objective", "phases"}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.5)])
def test_beats_pruning(pattern, rank: int) -> None:
    weight, H, gram = problem(24, 48)

    def fitted(S: torch.Tensor, G_weighted: bool) -> float:
        E = (weight - S).double()
        if G_weighted:  # better than any low-rank part on that S
            return exact_error(E, H.double(), rank)
        U, sigma, Vh = torch.linalg.svd(E)
        sigma[:rank] = 0
        return squared_error(U * sigma @ Vh[: len(sigma)], H.double())

    result = solve(weight, gram, pattern, rank, Options())
    error = squared_error((weight - result.dense()).double(), H.double())
    magnitude = project(weight, pattern)[0]
    wanda = weight * pattern.mask(weight.abs() * H.diagonal().sqrt())
    assert error < 0.9 * fitted(magnitude, G_weighted=False)
    assert error < 0.9 * fitted(wanda, G_weighted=True)


def test_low_rank_part_helps() -> None:
    weight, _, gram = problem(24, 48)
    found = [solve(weight, gram, TWO_OF_FOUR, rank, FAST).stats["objective"] for rank in (0, 2, 8)]
    assert found[0] > found[1] > found[2]


def test_deterministic_for_a_seed() -> None:
    weight, _, gram = problem(16, 32)
    torch.manual_seed(1)
    first = solve(weight, gram, TWO_OF_FOUR, 4, FAST, seed=3)
    torch.manual_seed(2)
    again = solve(weight, gram, TWO_OF_FOUR, 4, FAST, seed=3)
    other = solve(weight, gram, TWO_OF_FOUR, 4, FAST, seed=4)
    for name in ("S", "mask", "A", "B"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    for result in (first, again):
        result.stats.pop("phases")  # seconds
    assert first.stats == again.stats
    assert not torch.equal(first.A, other.A)


# Schedule


def test_converges_with_the_defaults() -> None:
    weight, _, gram = problem(8, 16)
    stats = solve(weight, gram, TWO_OF_FOUR, 2, Options()).stats
    assert stats["converged"] and 100 <= stats["iterations"] < 1000
    assert stats["rho"] > Options().rho


@pytest.mark.parametrize("most", [7, 15, 30])
def test_stops_at_max_iterations(most: int) -> None:
    weight, _, gram = problem(16, 32)
    options = Options(min_iterations=most, max_iterations=most, tolerance=1e-9)
    stats = solve(weight, gram, TWO_OF_FOUR, 4, options).stats
    assert stats["iterations"] == most and not stats["converged"]


@pytest.mark.parametrize("rank", [0, 2])
def test_starts_again_softer_where_rho_is_too_stiff(rank: int) -> None:
    weight, _, gram = problem(8, 16)
    stiff = Options(rho=1e4)
    result = solve(weight, gram, TWO_OF_FOUR, rank, stiff)
    # growth only ever raises rho; three restarts divide it by 125
    assert stiff.rho / 125 <= result.stats["rho"] < stiff.rho / 25
    without = solve(weight, gram, TWO_OF_FOUR, rank, replace(stiff, min_iterations=9, max_iterations=9))
    assert result.stats["objective"] < without.stats["objective"]
    assert TWO_OF_FOUR.allows(result.mask)


# Degenerate problems


def test_dead_inputs_get_no_weight() -> None:
    weight, H, _ = problem(8, 16)
    dead = [2, 3, 9]
    H[dead], H[:, dead] = 0, 0
    gram = ScaledGram(H)
    result = solve(weight, gram, TWO_OF_FOUR, 2, FAST)
    assert not result.S[:, dead].any() and not result.A[:, dead].any()
    assert (result.mask.reshape(-1, 4).sum(1) == 2).all()
    changed = weight.clone()
    changed[:, dead] += 1e3  # what a dead input weighs cannot matter
    assert torch.equal(result.dense(), solve(changed, gram, TWO_OF_FOUR, 2, FAST).dense())


def test_all_inputs_dead() -> None:
    result = solve(randn(4, 8).float(), ScaledGram(torch.zeros(8, 8)), TWO_OF_FOUR, 2, FAST)
    assert torch.equal(result.dense(), torch.zeros(4, 8))


@pytest.mark.parametrize("rank", [0, 2])
def test_nothing_to_remove(rank: int) -> None:
    weight, _, gram = problem(8, 16)
    result = solve(weight, gram, Unstructured(0.0), rank, FAST)
    assert result.mask.all()
    torch.testing.assert_close(result.dense(), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.5)])
def test_all_zero_weight(rank: int, pattern) -> None:
    _, _, gram = problem(8, 16)
    result = solve(torch.zeros(8, 16), gram, pattern, rank, FAST)
    assert torch.equal(result.dense(), torch.zeros(8, 16))
    assert result.stats["objective"] == 0 and pattern.allows(result.mask)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("rank", [0, 3])
def test_more_inputs_than_tokens(tokens: int, rank: int) -> None:
    weight, H, gram = problem(8, 32, tokens=tokens)
    result = solve(weight, gram, TWO_OF_FOUR, rank, Options())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (result.S, result.dense()))
    pruned = project(weight * gram.scale, TWO_OF_FOUR)[0] / gram.scale
    assert squared_error(weight - result.dense(), H) < 0.1 * squared_error(weight - pruned, H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_weight(dtype: torch.dtype) -> None:
    weight, _, gram = problem(8, 16)
    weight = weight.to(dtype)
    before = weight.clone()
    result = solve(weight, gram, TWO_OF_FOUR, 2, FAST)
    assert torch.equal(weight, before)
    assert torch.equal(result.dense(), solve(weight.float(), gram, TWO_OF_FOUR, 2, FAST).dense())
    assert result.S.dtype == result.A.dtype == result.B.dtype == torch.float32


def test_leaves_weight_and_gram_alone() -> None:
    weight, _, gram = problem(8, 16)
    before = weight.clone(), gram.matrix.clone()
    solve(weight, gram, TWO_OF_FOUR, 2, FAST)
    assert torch.equal(weight, before[0]) and torch.equal(gram.matrix, before[1])


# Options


def test_options_take_json_lists() -> None:
    assert Options(growth=[1.1, 1.05, 1.02], thresholds=[0.1, 0.005]) == Options()


@pytest.mark.parametrize(
    ("field", "value", "kind", "allowed"),
    [
        ("rho", 0, ValueError, "> 0"),
        ("rho", -1.0, ValueError, "> 0"),
        ("rho", float("nan"), ValueError, "> 0"),
        ("rho", float("inf"), ValueError, "> 0"),
        ("rho", "0.1", TypeError, "> 0"),
        ("tolerance", 0, ValueError, "> 0"),
        ("tolerance", True, TypeError, "> 0"),
        ("check_every", 0, ValueError, ">= 1"),
        ("check_every", 1.0, TypeError, ">= 1"),
        ("min_iterations", 0, ValueError, ">= 1"),
        ("max_iterations", None, TypeError, ">= 1"),
        ("max_iterations", 99, ValueError, "min_iterations=100"),
        ("cg_steps", 0, ValueError, ">= 1"),
        ("refit_rounds", -1, ValueError, ">= 0"),
        ("growth", (1.1, 1.05), TypeError, "3 numbers >= 1"),
        ("growth", 1.1, TypeError, "3 numbers >= 1"),
        ("thresholds", "ab", TypeError, "2 numbers >= 0"),
    ],
)
def test_options_name_field_value_and_allowed(field: str, value, kind: type, allowed: str) -> None:
    with pytest.raises(kind) as caught:
        Options(**{field: value})
    assert f"method_options.{field}={value!r}" in str(caught.value) and allowed in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("growth", (0.9, 1.0, 1.0)), ("thresholds", (0.1, -1)), ("growth", (1, 1, "x"))]
)
def test_options_name_the_bad_member(field: str, value: tuple) -> None:
    bad = next(item for item in value if isinstance(item, str) or item < (field == "growth"))
    with pytest.raises((TypeError, ValueError), match=rf"method_options\.{field}={bad!r}: expected a finite number"):
        Options(**{field: value})
