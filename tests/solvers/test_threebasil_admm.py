"""The grouped one-product iteration: its steps against the published ones in float64, and its parts."""

import os
import subprocess
import sys
import time

import pytest
import torch
from helpers.layer_references import fit_error, least_error

from hf_sparselr.format.patterns import NM, Unstructured, project
from hf_sparselr.solvers.base import cholesky_qr, randomized_range_finder, scaled, subspace_iteration_step
from hf_sparselr.solvers.gram import SMALL_SHIFT, ScaledGram, shift_inverse, squared_error
from hf_sparselr.solvers.threebasil import admm, cpu_steps, method
from hf_sparselr.solvers.threebasil.admm import LARGEST_SHIFT, Admm
from hf_sparselr.solvers.threebasil.bands import bands_of
from hf_sparselr.solvers.threebasil.method import Options, refine_on_support, solve, solve_group

TWO_OF_FOUR = NM(2, 4)
HALF = Unstructured(0.5)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(kind: str, n: int) -> torch.Tensor:
    """Calibration inputs (tokens, n), as different as models make them."""
    X = randn(400, n, seed=1) @ (torch.eye(n) + 0.5 * randn(n, n, seed=2) / n**0.5)
    X = X + randn(400, 1, seed=3)
    if kind == "rank-deficient":
        X = X[: n // 4]
    if kind == "outlier channels":
        X[:, ::7] *= 1000
    if kind == "dead inputs":
        X[:, [0, 5, 6]] = 0
    if kind == "ill-conditioned":  # condition of X^T X: 1e8
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        X = U * torch.logspace(0, -4, n, dtype=torch.float64) @ Vh
    return X


def gram_of(kind: str = "plain", n: int = 48, damping: tuple[float, float] = (0.005, 0.005)) -> ScaledGram:
    X = inputs(kind, n)
    return ScaledGram((X.T @ X).float(), damping)


def weight_of(out: int, n: int = 48, seed: int = 0) -> torch.Tensor:
    return randn(out, n, seed=100 + seed).float()


def start(pattern=TWO_OF_FOUR, rank: int = 0, rho: float = 0.1, out: int = 16) -> Admm:
    gram = gram_of()
    return Admm([scaled(weight_of(out), gram)], gram, [pattern], [rank], rho, 0, "fp32")


def state(run: Admm) -> dict[str, torch.Tensor]:
    """The blocks D and L and the dual V, float64."""
    T = run.T.double()
    D, V = torch.where(run.mask, T, 0), torch.where(run.mask, 0, run.rho * T)
    return {"D": D, "V": V, "L": run.L.double()}


def exact_fit(E: torch.Tensor, G: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(basis, best L of that rank under G), float64."""
    basis = torch.linalg.eigh(E @ G @ E.T).eigenvectors[:, len(E) - rank :]
    return basis, basis @ (basis.T @ E)


# One step


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, NM(1, 4), HALF, Unstructured(0.8)])
@pytest.mark.parametrize(("rho", "before"), [(0.1, 0), (0.1, 5), (3.0, 12)])
def test_a_step_is_the_published_one(pattern, rank: int, rho: float, before: int) -> None:
    run = start(pattern, rank, rho)
    run.run(before)
    run.raise_rho(1.02)
    old, G, W, rho = state(run), run.gram.matrix.double(), run.W.double(), run.rho
    right = (W - old["L"]) @ G - old["V"] + rho * old["D"]
    copy = torch.linalg.solve(G + rho * torch.eye(len(G), dtype=torch.float64), right, left=False)
    D, mask = project(copy + old["V"] / rho, pattern)
    V = old["V"] + rho * (copy - D)
    basis, L = exact_fit(W - copy, G, rank)
    if rank:
        run._bands[0].coefficients.copy_(basis.T @ (W - copy))  # one subspace step from there leaves the exact basis
    run.run(1)
    new = state(run)
    assert torch.equal(run.mask, mask)
    for name, expected in (("D", D), ("V", V), ("L", L)):
        assert (new[name] - expected).norm() <= 3e-4 * expected.norm()


def test_raising_rho_keeps_the_blocks_and_the_dual() -> None:
    for factor in (1.0, 1.02, 1.1, 2.0):
        run = start(HALF, 3)
        run.run(5)
        old, mask, rho = state(run), run.mask.clone(), run.rho
        run.raise_rho(factor)
        new = state(run)
        assert run.rho == pytest.approx(factor * rho) and float(run._rho) == pytest.approx(run.rho)
        assert torch.equal(run.mask, mask) and old["V"].any()
        assert torch.equal(new["D"], old["D"]) and torch.equal(new["L"], old["L"])
        torch.testing.assert_close(new["V"], old["V"], rtol=1e-6, atol=0)


def test_restart_is_a_new_start() -> None:
    run = start(HALF)
    run.run(5)
    run.raise_rho(1.1)
    run.restart(0.02)
    fresh = start(HALF, rho=0.02)
    for name in ("T", "mask", "L", "M"):
        assert torch.equal(getattr(run, name), getattr(fresh, name))
    assert run.rho == fresh.rho
    run.run(7)
    fresh.run(7)
    assert torch.equal(run.T, fresh.T)


def test_the_given_weights_stay_as_they_are() -> None:
    gram = gram_of()
    weights = [weight_of(8), weight_of(12, seed=1)]
    before = [weight.clone() for weight in weights]
    for given in (weights[:1], weights):
        run = Admm(given, gram, [HALF] * len(given), [2] * len(given), 0.1, 0, "fp32")
        run.run(3)
    assert all(map(torch.equal, weights, before))


@pytest.mark.skipif(not cpu_steps.available(), reason="needs a C compiler")
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, NM(1, 4), NM(5, 6), HALF], ids=str)
@pytest.mark.parametrize("out", [2, 150])
def test_steps_in_c_are_those_of_torch(pattern, out: int, monkeypatch) -> None:
    def run() -> Admm:
        run = start(pattern, 2, out=out)
        run.T[0] = 0  # ties go to the lower index
        run.run(9)
        return run

    compiled = run()
    monkeypatch.setattr(cpu_steps, "available", lambda: False)
    plain = run()
    assert torch.equal(compiled.T, plain.T) and torch.equal(compiled.mask, plain.mask)


# Groups


GROUPS = {
    "equal": [(24, TWO_OF_FOUR, 4)] * 3,
    "shapes": [(24, TWO_OF_FOUR, 4), (8, TWO_OF_FOUR, 4), (40, TWO_OF_FOUR, 4)],
    "ranks": [(24, HALF, 0), (24, HALF, 5), (24, HALF, 1)],
    "N:M": [(24, NM(1, 4), 2), (24, TWO_OF_FOUR, 2), (24, NM(5, 6), 0)],
    "all different": [(24, TWO_OF_FOUR, 4), (8, HALF, 0), (40, Unstructured(0.7), 2)],
    "one beside a huge one": [(4, HALF, 1), (160, HALF, 8)],
}


@pytest.mark.parametrize("group", GROUPS)
def test_layers_solved_together_are_as_good_as_alone(group: str) -> None:
    gram, layers = gram_of(), GROUPS[group]
    weights = [weight_of(out, seed=seed) for seed, (out, _, _) in enumerate(layers)]
    patterns, ranks = [pattern for _, pattern, _ in layers], [rank for _, _, rank in layers]
    together, alone = solve_group(weights, gram, patterns, ranks, Options()), []
    for weight, pattern, rank, result in zip(weights, patterns, ranks, together, strict=True):
        alone.append(solve(weight, gram, pattern, rank, Options()).stats["objective"])
        assert int(result.mask.sum()) == pattern.kept(weight.shape) and pattern.allows(result.mask)
        assert not result.S[~result.mask].any()
        assert (result.A is None) == (rank == 0) and (rank == 0 or result.A.shape == (rank, 48))
        error = (weight - result.dense()) * gram.scale
        assert squared_error(error, gram.matrix) == pytest.approx(result.stats["objective"], rel=1e-3)
    found = [result.stats["objective"] for result in together]
    assert sum(found) < 1.03 * sum(alone)
    # They share rho and stopping, so a layer of this size can come out a few per cent better or worse.
    assert sum(mine / own for mine, own in zip(found, alone, strict=True)) < 1.1 * len(found)


def test_the_published_form_solves_one_layer_after_the_other() -> None:
    gram, weights, options = (
        gram_of(),
        [weight_of(16), weight_of(8, seed=1)],
        Options("textbook", max_iterations=100),
    )
    together = solve_group(weights, gram, [TWO_OF_FOUR, HALF], [2, 0], options)
    for weight, pattern, rank, result in zip(weights, [TWO_OF_FOUR, HALF], [2, 0], together, strict=True):
        assert torch.equal(result.dense(), solve(weight, gram, pattern, rank, options).dense())


def test_a_group_of_one_is_a_layer() -> None:
    gram, weight = gram_of(), weight_of(16)
    one, other = (
        solve_group([weight], gram, [HALF], [3], Options())[0],
        solve(weight, gram, HALF, 3, Options()),
    )
    assert torch.equal(one.dense(), other.dense())


def test_the_order_of_a_group_does_not_matter() -> None:
    gram, weights = gram_of(), [weight_of(16), weight_of(8, seed=1)]
    options = Options(min_iterations=20, max_iterations=20)
    forth = solve_group(weights, gram, [TWO_OF_FOUR] * 2, [2, 0], options)
    back = solve_group(weights[::-1], gram, [TWO_OF_FOUR] * 2, [0, 2], options)[::-1]
    for left, right in zip(forth, back, strict=True):
        assert torch.equal(left.mask, right.mask)
        torch.testing.assert_close(left.dense(), right.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, HALF, Unstructured(0.7)])
def test_one_product_ends_no_higher_than_the_textbook_form(pattern, rank: int) -> None:
    gram, weight = gram_of(n=128), weight_of(96, 128)
    ours, published = (solve(weight, gram, pattern, rank, Options(form=form)) for form in ("one-product", "textbook"))
    assert ours.stats["objective"] < 1.025 * published.stats["objective"]
    assert not torch.equal(ours.S, published.S)


# Gram matrices that are hard in FP32


def reference(weight: torch.Tensor, gram: ScaledGram, pattern, rank: int, options: Options) -> float:
    """The objective that the published iteration reaches in float64, with the same schedule and refit."""
    G, W = gram.matrix.double(), scaled(weight, gram).double()
    D, mask = project(W, pattern)
    V, L, basis, rho = torch.zeros_like(W), torch.zeros_like(W), None, options.rho
    if rank:
        basis = randomized_range_finder((W - D).float(), gram.matrix, rank, 0).double()
    for iteration in range(options.max_iterations):
        right = (W - L) @ G - V + rho * D
        copy = torch.linalg.solve(G + rho * torch.eye(len(G), dtype=torch.float64), right, left=False)
        D, mask = project(copy + V / rho, pattern)
        V = V + rho * (copy - D)
        if rank:
            basis = subspace_iteration_step(W - copy, G, basis)
            L = basis @ (basis.T @ (W - copy))
        if (iteration + 1) % options.check_every == 0:
            rho *= options.growth[0]
    S, L = D, torch.zeros_like(W)
    for _ in range(options.refit_rounds):
        if rank:
            basis = subspace_iteration_step(W - S, G, basis)
            L = basis @ (basis.T @ (W - S))
        S = refine_on_support(S, W - L, mask, G, options.cg_steps)
    return least_error(W - S, gram, rank)


STEADY = Options(growth=(1.1, 1.1, 1.1), min_iterations=120, max_iterations=120, tolerance=1e-12)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.6)])
@pytest.mark.parametrize("damping", [(0.005, 0.005), (0.0, 0.0)])
@pytest.mark.parametrize("kind", ["rank-deficient", "ill-conditioned", "outlier channels", "dead inputs"])
def test_as_good_as_float64(kind: str, damping, pattern, rank: int) -> None:
    gram, weight = gram_of(kind, damping=damping), weight_of(24)
    result = solve(weight, gram, pattern, rank, STEADY)
    assert torch.isfinite(result.dense()).all()
    size = squared_error(scaled(weight, gram), gram.matrix)
    assert result.stats["objective"] < 1.1 * reference(weight, gram, pattern, rank, STEADY) + 1e-5 * size


# (G + rho I)^-1


@pytest.mark.parametrize("kind", ["plain", "rank-deficient", "ill-conditioned", "outlier channels"])
@pytest.mark.parametrize("factor", [1.0, 1.02, 1.15])
def test_shift_inverse_is_within_its_bound(kind: str, factor: float) -> None:
    G, rho = gram_of(kind, damping=(0.0, 0.0)).matrix.double(), 0.1
    M = torch.linalg.inv(G + rho * torch.eye(len(G), dtype=torch.float64))
    exact = torch.linalg.inv(G + factor * rho * torch.eye(len(G), dtype=torch.float64))
    found = shift_inverse(M, rho, rho * (factor - 1))
    ratios = torch.linalg.eigvals(torch.linalg.solve(exact, found)).real  # of eigenvalues, to the exact ones
    share = factor - 1
    assert (ratios - 1).abs().max() <= 1.01 * (share**2 / 8 if share <= SMALL_SHIFT else share**4) + 1e-6
    before = M.clone()
    shift_inverse(M, rho, rho * (factor - 1))
    assert torch.equal(M, before)


@pytest.mark.parametrize("factor", [1.01, 1.1])
def test_many_shifts_stay_near_the_inverse(factor: float) -> None:
    run = start()
    for _ in range(60):
        run.raise_rho(factor)
    exact = torch.linalg.inv(run.gram.matrix.double() + run.rho * torch.eye(48, dtype=torch.float64))
    error = torch.linalg.matrix_norm(run.M.double() - exact, 2) / torch.linalg.matrix_norm(exact, 2)
    assert error < 2e-3


def test_a_large_factor_takes_a_new_factorisation() -> None:
    for factor in (1.1, LARGEST_SHIFT, 1.3, 5.0):
        run = start()
        run.raise_rho(factor)
        assert torch.equal(run.M, run.gram.inverse(run.rho)) == (factor > LARGEST_SHIFT)


# The low-rank basis


@pytest.mark.parametrize("shape", [(40, 1), (64, 16), (300, 64), (600, 256)])
def test_orthonormalise_keeps_the_span(shape: tuple[int, int]) -> None:
    """Columns as a warm start has them: nearly orthogonal, of very different lengths."""
    Q = torch.linalg.qr(randn(*shape)).Q
    Y = (Q + 0.02 * randn(*shape, seed=1) / shape[0] ** 0.5) * torch.logspace(3, -6, shape[1])
    P = cholesky_qr([Y.float()])[0].double()
    torch.testing.assert_close(P.T @ P, torch.eye(shape[1], dtype=torch.float64), rtol=0, atol=1e-3)
    exact = torch.linalg.qr(Y).Q
    torch.testing.assert_close(exact @ (exact.T @ P), P, rtol=0, atol=1e-4)


def test_orthonormalise_gives_the_fit_of_a_qr_factorisation() -> None:
    gram, E = gram_of(), weight_of(32)
    basis = randomized_range_finder(E, gram.matrix, 6, seed=0, steps=1)
    one, other = (
        cholesky_qr([E @ (gram.matrix @ (E.T @ basis))])[0],
        subspace_iteration_step(E, gram.matrix, basis),
    )
    assert fit_error(E, gram, one) == pytest.approx(fit_error(E, gram, other), rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("shape", [(64, 8), (400, 60)])
def test_dependent_columns_come_out_short_and_finite(shape: tuple[int, int], noise: float, seed: int) -> None:
    Y = (randn(shape[0], 1, seed=seed) + noise * randn(*shape, seed=seed + 50)).float()
    P = cholesky_qr([Y])[0]
    assert torch.linalg.matrix_norm(P, 2) < 1.01
    largest = torch.linalg.svd(Y.double(), full_matrices=False).U[:, 0]
    assert (largest @ P.double()).norm() > 0.99  # what dominates them all is in the span


def test_zero_columns_give_zeros() -> None:
    Y = randn(20, 6).float()
    Y[:, [1, 4]] = 0
    P = cholesky_qr([Y])[0]
    assert not P[:, [1, 4]].any()
    kept = P[:, [0, 2, 3, 5]]
    torch.testing.assert_close(kept.T @ kept, torch.eye(4), rtol=0, atol=1e-3)
    assert not cholesky_qr([torch.zeros(20, 6)])[0].any()


def test_more_rank_than_the_error_has() -> None:
    """What is left after pruning has rank 2, and the bases six columns."""
    gram = gram_of()
    weight = (randn(24, 2) @ randn(2, 48, seed=1)).float()
    result = solve(weight, gram, Unstructured(0.9), 6, Options())
    assert torch.isfinite(result.dense()).all()
    assert result.stats["objective"] < 1e-4 * squared_error(scaled(weight, gram), gram.matrix)


# Kernels


def test_a_machine_without_a_compiler_runs_the_steps_as_they_are(tmp_path) -> None:
    code = """
import torch
from hf_sparselr.solvers.threebasil.admm import _compiled, _correction
T, W, L = torch.randn(3, 4, 8)
given = T, T > 0, W, L, torch.tensor(0.1), torch.float32
for _ in range(2):
    assert torch.equal(_compiled(_correction)(*given), _correction(*given))
"""
    environment = {**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "suppress_errors" in run.stderr or "c++" in run.stderr  # not silently


# What is reported


@pytest.mark.parametrize(
    ("form", "precision", "expected"),
    [
        ("one-product", "auto", "bf16"),
        ("one-product", "bf16", "bf16"),
        ("one-product", "tf32", "fp32"),  # TF32 is for GPUs
        ("one-product", "fp32", "fp32"),
        ("textbook", "auto", "fp32"),
    ],
)
def test_the_precision_that_was_used_is_reported(form, precision, expected, rounding: None) -> None:
    options = Options(max_iterations=100, form=form, precision=precision)
    assert solve(weight_of(16), gram_of(), HALF, 2, options).stats["precision"] == expected


def test_the_phases_of_a_group_add_up_to_its_time() -> None:
    weights, gram = [weight_of(16, seed=seed) for seed in range(3)], gram_of()
    started = time.perf_counter()
    results = solve_group(weights, gram, [HALF] * 3, [2] * 3, Options(max_iterations=100))
    elapsed = time.perf_counter() - started
    phases = [result.stats["phases"] for result in results]
    assert all(row.keys() == {"factorisation", "ADMM", "refit"} for row in phases)
    assert 0.2 * elapsed < sum(sum(row.values()) for row in phases) <= elapsed


@pytest.mark.parametrize("kind", ["plain", "rank-deficient", "outlier channels", "ill-conditioned"])
@pytest.mark.parametrize("damping", [(0.005, 0.005), (0.0, 1e-7)])
def test_rounded_products_do_not_show(kind: str, damping: tuple[float, float], rounding: None) -> None:
    # Of many rows: in few of them the weights that any rounding tips would show.
    weight, gram = weight_of(1024, 96), gram_of(kind, 96, damping)
    rounded, full = (
        solve(weight, gram, TWO_OF_FOUR, 4, Options(precision=precision)).stats["objective"]
        for precision in ("auto", "fp32")
    )
    assert rounded <= 1.01 * full


def test_a_precision_whose_rounding_shows_leaves_no_trace(rounding: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparselr.solvers.threebasil.admm.ROUNDING", -1.0)
    run, full = (
        Admm([scaled(weight_of(16), gram_of())], gram_of(), [HALF], [2], 0.1, 0, precision)
        for precision in ("auto", "fp32")
    )
    assert run.precision == "bf16"
    for each in (run, full):
        each.run(10)
    assert run.precision == "fp32"
    assert all(map(torch.equal, (run.T, run.mask, run.L), (full.T, full.mask, full.L)))


def test_the_best_iterate_of_the_refit_is_returned() -> None:
    gram, weight = gram_of(), weight_of(24)
    run = Admm([scaled(weight, gram)], gram, [HALF], [3], 0.1, 0, "fp32")
    run.run(60)
    (D, mask, basis), W = next(run.result()), run.W
    S, basis = method._refit(W, D, mask, basis, gram.matrix, Options())
    assert not S[~mask].any()
    E = W - S
    assert squared_error(E - basis @ (basis.T @ E), gram.matrix) < least_error(W - D, gram, 3)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 0, 3), (0, 2, 0), (0, 0, 0)], ids=str)
def test_layers_joined_in_one_band_are_solved_as_alone(ranks: tuple[int, ...], monkeypatch) -> None:
    def run() -> list[torch.Tensor]:
        weights, gram = [scaled(weight_of(out), gram_of()) for out in (24, 8, 16)], gram_of()
        run = Admm(weights, gram, [TWO_OF_FOUR] * 3, list(ranks), 0.1, 0, "fp32")
        run.run(5)
        return [run.L, run.T]

    apart = run()
    monkeypatch.setattr(admm, "bands_of", lambda layers, like, join: bands_of(layers, like, join=True))
    for joined, alone in zip(run(), apart, strict=True):
        torch.testing.assert_close(joined, alone, rtol=1e-3, atol=1e-3)
