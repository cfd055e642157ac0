"""The exact Gram-weighted low-rank fit, and the methods of one fit, against float64 references."""

import pytest
import torch
from helpers.layer_problems import TWO_OF_FOUR, diagonal_gram, problem, randn
from helpers.layer_references import fit_error, in_scale, least_error, objective, truncated

from hf_sparselr.format.patterns import EMPTY, NM
from hf_sparselr.solvers import eora, svd
from hf_sparselr.solvers.base import exact_basis, left_singular_vectors, scaled
from hf_sparselr.solvers.gram import ScaledGram, squared_error
from hf_sparselr.solvers.pruners import PRUNERS


def svd_only(weight: torch.Tensor, gram: ScaledGram, rank: int):
    return svd.solve(weight, gram, EMPTY, rank, svd.Options())


# The exact fit


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("damping", [(0.005, 0.005), (0.0, 0.0)])
def test_exact_fit_is_the_minimiser(shape: tuple[int, int], rank: int, damping) -> None:
    E, gram = problem(*shape, damping=damping)
    basis = exact_basis(E, gram, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)
    found, whole = fit_error(E, gram, basis), fit_error(E, gram, torch.zeros(shape[0], 1))
    assert found == pytest.approx(least_error(E, gram, rank), rel=1e-5, abs=1e-5 * whole)
    if rank < min(shape):
        nearby = torch.linalg.qr(basis + 0.03 * randn(*basis.shape).float()).Q
        assert found < fit_error(E, gram, nearby)


@pytest.mark.parametrize("shape", [(12, 30), (40, 30)])
@pytest.mark.parametrize("tokens", [1, 8])
def test_exact_fit_at_a_singular_gram(shape: tuple[int, int], tokens: int) -> None:
    E, gram = problem(*shape, tokens=tokens, damping=(0.0, 0.0))
    whole = fit_error(E, gram, torch.zeros(shape[0], 1))
    for rank in (1, 3, 8):
        basis = exact_basis(E, gram, rank)
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)
        assert fit_error(E, gram, basis) == pytest.approx(least_error(E, gram, rank), rel=1e-4, abs=1e-5 * whole)
    assert fit_error(E, gram, basis) < 1e-5 * whole  # no more directions than tokens


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
def test_left_singular_vectors_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    matrix = randn(*shape)
    basis, expected = left_singular_vectors(matrix, 3), torch.linalg.svd(matrix).U[:, :3]
    torch.testing.assert_close(basis @ basis.T, expected @ expected.T)


@pytest.mark.parametrize("tokens", [3, 100])
def test_root_is_a_square_root_of_the_gram(tokens: int) -> None:
    _, gram = problem(2, 12, tokens=tokens, damping=(0.0, 0.0))
    torch.testing.assert_close(gram.root @ gram.root.T, gram.matrix, rtol=1e-4, atol=1e-5)


# Low rank alone


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
@pytest.mark.parametrize("rank", [1, 5])
def test_svd_is_optimal_and_beats_the_plain_svd(shape: tuple[int, int], rank: int) -> None:
    weight, gram = problem(*shape)
    result = svd_only(weight, gram, rank)
    assert not result.S.any() and not result.mask.any()
    assert result.A.shape == (rank, shape[1]) and result.B.shape == (shape[0], rank)
    assert objective(weight, result, gram) == pytest.approx(result.stats["objective"], rel=1e-4)
    assert result.stats["objective"] == pytest.approx(least_error(in_scale(weight, gram), gram, rank), rel=1e-4)
    plain = in_scale(weight.double() - truncated(weight.double(), rank), gram)
    assert result.stats["objective"] < 0.95 * squared_error(plain, gram.matrix.double())


def test_svd_by_hand() -> None:
    """The second input is ten times as large, so the smaller weight matters more: 2 * 10 > 3 * 1."""
    result = svd_only(torch.diag(torch.tensor([3.0, 2.0])), diagonal_gram(1.0, 100.0), 1)
    torch.testing.assert_close(result.dense(), torch.diag(torch.tensor([0.0, 2.0])))


def test_svd_of_full_rank_is_the_weight() -> None:
    weight, gram = problem(8, 12)
    torch.testing.assert_close(svd_only(weight, gram, 8).dense(), weight, rtol=1e-4, atol=1e-4)


def test_svd_ignores_dead_inputs_and_takes_singular_grams() -> None:
    weight, gram = problem(8, 16, tokens=2, damping=(0.0, 0.0))
    H = gram.matrix.clone()
    H[3], H[:, 3] = 0, 0
    result = svd_only(weight, ScaledGram(H, (0.0, 0.0)), 2)
    assert torch.isfinite(result.dense()).all() and not result.A[:, 3].any()
    assert result.stats["objective"] < 1e-4 * squared_error(weight, H)


def test_svd_refuses_rank_0() -> None:
    weight, gram = problem(4, 8)
    with pytest.raises(ValueError, match=r"rank=0.*expected an integer >= 1"):
        svd_only(weight, gram, 0)


# One fit after a pruner


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("shape", [(12, 24), (24, 12)])
def test_eora_is_the_pruner_and_the_exact_fit_of_its_error(pruner: str, shape: tuple[int, int]) -> None:
    weight, gram = problem(*shape)
    result = eora.solve(weight, gram, TWO_OF_FOUR, 3, eora.Options(pruner))
    S, mask, _ = PRUNERS[pruner].prune(scaled(weight, gram), gram, TWO_OF_FOUR, PRUNERS[pruner].options())
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(in_scale(result.S, gram), S.double(), rtol=1e-5, atol=1e-6)
    # the paper's form: project into the eigenspace, truncate, project back
    values, Q = torch.linalg.eigh(gram.matrix.double())
    E = scaled(weight, gram).double() - S.double()
    L = truncated(E @ (Q * values.sqrt()), 3) / values.sqrt() @ Q.T
    torch.testing.assert_close(in_scale(result.B @ result.A, gram), L, rtol=1e-3, atol=1e-4)
    assert result.stats["objective"] == pytest.approx(least_error(E, gram, 3), rel=1e-4)


def test_eora_by_hand() -> None:
    """1:2 leaves an error with equal rows, which one direction makes up for exactly."""
    weight = torch.tensor([[3.0, 1.0], [5.0, 1.0]])
    result = eora.solve(weight, diagonal_gram(1.0, 4.0), NM(1, 2), 1, eora.Options("wanda"))
    assert result.mask.tolist() == [[True, False], [True, False]]
    torch.testing.assert_close(result.B @ result.A, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    torch.testing.assert_close(result.dense(), weight)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_eora_at_rank_0_is_the_pruner(pruner: str) -> None:
    weight, gram = problem(8, 16)
    result = eora.solve(weight, gram, TWO_OF_FOUR, 0, eora.Options(pruner))
    S, _, stats = PRUNERS[pruner].prune(scaled(weight, gram), gram, TWO_OF_FOUR, PRUNERS[pruner].options())
    torch.testing.assert_close(result.dense(), S / gram.scale)
    assert result.stats["objective"] == pytest.approx(stats["objective"])
    assert result.stats["iterations"] == stats["iterations"]
