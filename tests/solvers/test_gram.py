"""Gram matrices: accumulation, damping, scaling and (G + rho I)^-1 against float64."""

import pytest
import torch

from hf_sparselr.solvers import gram
from hf_sparselr.solvers.gram import GramAccumulator, ScaledGram, squared_error


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram_of(kind: str, n: int = 24) -> torch.Tensor:
    """H in float64, as different as calibration data make it."""
    X = randn(200, n, dtype=torch.float64)
    if kind == "rank-deficient":
        X = X[: n // 3]
    elif kind == "one token":
        X = X[:1]
    elif kind == "outlier channels":
        X[:, ::7] *= 100
    elif kind == "ill-conditioned":
        X = X @ torch.linalg.qr(randn(n, n, seed=1, dtype=torch.float64)).Q
        X = torch.linalg.svd(X, full_matrices=False).U * torch.logspace(0, -4, n, dtype=torch.float64)
        X = X @ torch.linalg.qr(randn(n, n, seed=2, dtype=torch.float64)).Q
    elif kind == "dead inputs":
        X[:, [3, 8]] = 0
    return X.T @ X


KINDS = ["plain", "rank-deficient", "one token", "outlier channels", "ill-conditioned", "dead inputs"]


def test_accumulates_the_gram_matrix_of_all_rows() -> None:
    batches = [
        randn(5, 12, seed=1),
        randn(2, 7, 12, seed=2),
        randn(2, 3, 4, 12, seed=3, dtype=torch.float64),
        randn(1, 9, 12, seed=4, dtype=torch.bfloat16),
        randn(6, 12, seed=5, dtype=torch.float16),
        randn(12, 6, seed=6).T,
        randn(12, seed=7),
        randn(0, 12),
    ]
    accumulator = GramAccumulator(12, "cpu")
    for batch in batches:
        accumulator.add(batch)
    X = torch.cat([batch.double().reshape(-1, 12) for batch in batches])
    assert accumulator.rows == len(X)
    assert accumulator.gram.dtype == torch.float32
    torch.testing.assert_close(accumulator.gram.double(), X.T @ X, rtol=1e-5, atol=1e-5)


def test_accumulation_takes_no_part_in_autograd() -> None:
    accumulator = GramAccumulator(4, "cpu")
    accumulator.add(torch.ones(3, 4, requires_grad=True))
    assert not accumulator.gram.requires_grad


def test_damping_by_hand() -> None:
    H = torch.tensor([[4.0, 2.0], [2.0, 16.0]])
    gram = ScaledGram(H, damping=(0.25, 0.5))
    # diagonal 4 -> 4 * 1.25 + 0.5 * 10 = 10; 16 -> 16 * 1.25 + 0.5 * 10 = 25
    torch.testing.assert_close(gram.scale, torch.tensor([10.0, 25.0]).sqrt())
    off = 2 / (10**0.5 * 5)
    torch.testing.assert_close(gram.matrix, torch.tensor([[1.0, off], [off, 1.0]]))
    assert not gram.dead.any()


def test_dead_inputs_by_hand() -> None:
    gram = ScaledGram(torch.diag(torch.tensor([3.0, 0.0])), damping=(0.5, 0.25))
    # the dead input counts as 1: 3 -> 4.5 + 0.25 * 2, 1 -> 1.5 + 0.25 * 2
    torch.testing.assert_close(gram.scale.square(), torch.tensor([5.0, 2.0]))
    assert gram.dead.tolist() == [False, True]
    assert torch.equal(gram.matrix, torch.eye(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [(0.0, 0.0), (0.005, 0.005), (0.1, 0.0), (0.0, 0.1)])
def test_scaled_back_it_is_the_damped_matrix(kind: str, damping: tuple[float, float]) -> None:
    H = gram_of(kind)
    gram = ScaledGram(H.float(), damping)
    diagonal = torch.where(H.diagonal() == 0, 1.0, H.diagonal())
    damped = H - torch.diag(H.diagonal())
    damped += torch.diag(diagonal * (1 + damping[0]) + damping[1] * diagonal.mean())
    scale = gram.scale.double()
    torch.testing.assert_close(scale[:, None] * gram.matrix.double() * scale, damped, rtol=1e-5, atol=1e-6)
    assert torch.equal(gram.matrix.diagonal(), torch.ones(len(H)))
    assert gram.dead.nonzero().flatten().tolist() == ([3, 8] if kind == "dead inputs" else [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [(0.0, 0.0), (0.005, 0.005)])
@pytest.mark.parametrize("rho", [1e-2, 0.1, 10.0])
def test_inverse(kind: str, damping: tuple[float, float], rho: float) -> None:
    gram = ScaledGram(gram_of(kind).float(), damping)
    exact = torch.linalg.inv(gram.matrix.double() + rho * torch.eye(len(gram.matrix)))
    inverse = gram.inverse(rho)
    assert inverse.dtype == torch.float32
    error = torch.linalg.matrix_norm(inverse.double() - exact) / torch.linalg.matrix_norm(exact)
    assert error < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(value: float) -> None:
    H = torch.eye(4)
    H[1, 2] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        ScaledGram(H)


def test_leaves_its_argument_alone() -> None:
    H = gram_of("dead inputs").float()
    before = H.clone()
    ScaledGram(H).inverse(0.1)
    assert torch.equal(H, before)


def test_squared_error_is_the_error_of_the_outputs() -> None:
    X, E = randn(50, 12, dtype=torch.float64), randn(5, 12, seed=1, dtype=torch.float64)
    assert squared_error(E, X.T @ X) == pytest.approx(float((X @ E.T).square().sum()))


@pytest.mark.parametrize("damping", [(0.0, 0.0), (0.005, 0.005), (0.3, 0.0)])
def test_squared_error_of_a_scaled_matrix_is_without_damping(damping: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 12, generator=generator) * torch.logspace(-2, 2, 12)
    X[:, 3] = 0
    error = torch.randn(5, 12, generator=generator)
    scaled = ScaledGram(X.T @ X, damping)
    assert scaled.squared_error(error) == pytest.approx(float((error @ X.T).square().sum()), rel=1e-4)


def test_a_triangular_matrix_is_inverted_by_halves(monkeypatch) -> None:
    monkeypatch.setattr(gram, "SMALL_TRIANGLE", 4)
    for size in (1, 4, 9, 30):
        L = torch.linalg.cholesky(gram_of("plain", size) + torch.eye(size, dtype=torch.float64))
        inverse = gram.lower_inverse(L)
        torch.testing.assert_close(inverse @ L, torch.eye(size, dtype=torch.float64))
        assert torch.equal(inverse, inverse.tril())


def test_symmetric_matrices_are_made_of_the_parts_below_the_diagonal(monkeypatch) -> None:
    monkeypatch.setattr(gram, "SPLIT", 8)
    for size in (8, 13, 30):
        U = randn(size, size, dtype=torch.float64).tril()
        torch.testing.assert_close(gram._square_of_lower(U), U.T @ U)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [40, 9001])
def test_on_a_gpu_the_lower_half_is_enough(size: int) -> None:
    batches = [randn(60, size, seed=seed, dtype=torch.bfloat16).cuda() for seed in range(2)]
    accumulator = GramAccumulator(size, "cuda")
    for batch in batches:
        accumulator.add(batch)
    X = torch.cat(batches).double()
    torch.testing.assert_close(accumulator.gram.double(), X.T @ X, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_a_rounded_inverse_is_near_the_exact_one() -> None:
    X = randn(9000, 1500).cuda()
    scaled = ScaledGram(X.T @ X)
    exact, rounded = (scaled.inverse(0.1, precision) for precision in ("fp32", "bf16"))
    assert not torch.equal(exact, rounded)
    assert (rounded - exact).norm() < 2e-3 * exact.norm()
