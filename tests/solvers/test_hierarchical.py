"""Hierarchical low-rank parts: recovery, optimality, permutation, and what the methods make of them."""

import dataclasses
import importlib.util
import itertools

import pytest
import torch
from helpers import tiny
from helpers.hierarchies import SHAPES, random_hierarchy
from helpers.layer_problems import problem, randn
from helpers.layer_references import objective

from hf_sparselr.format.hierarchy import HierarchyShape
from hf_sparselr.format.patterns import EMPTY, NM, Unstructured
from hf_sparselr.solvers.base import scaled
from hf_sparselr.solvers.gram import ScaledGram, squared_error
from hf_sparselr.solvers.hierarchical_fit import HierarchicalFit, leaf_mask, truncate
from hf_sparselr.solvers.permutation import reverse_cuthill_mckee
from hf_sparselr.solvers.registry import METHODS

SHAPE = HierarchyShape(24, 40, (3, 2))
HIERARCHICAL = [name for name, method in METHODS.items() if method.hierarchical]
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="SciPy is an extra")


def solve(name: str, weight, gram, pattern, shape=SHAPE, permutation=None):
    method = METHODS[name]
    options = method.options(**(tiny.FAST if name == "3basil" else {}))
    pattern = pattern if method.sparse else EMPTY
    return method.solve_hierarchical(weight, gram, pattern, shape, permutation, options, 0)


def random_orders(shape: HierarchyShape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randperm(n, generator=generator) for n in (shape.out_features, shape.in_features))


# -- fits


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truncation_recovers_a_hierarchical_matrix(shape, permuted: bool) -> None:
    hierarchy = random_hierarchy(shape, permuted, torch.float32)
    dense = hierarchy.dense()
    orders = (hierarchy.row_order.long(), hierarchy.column_order.long()) if permuted else None
    found = truncate(dense, shape, orders)
    torch.testing.assert_close(found.dense(), dense, atol=1e-4, rtol=1e-4)
    assert found.A.shape == shape.sizes["A"] and found.leaves.shape == shape.sizes["leaves"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_fit_recovers_a_hierarchical_matrix(shape) -> None:
    weight, gram = problem(shape.out_features, shape.in_features)
    weight = random_hierarchy(shape, False, torch.float32).dense()
    Wt, fit = scaled(weight, gram), HierarchicalFit(shape, gram.matrix)
    for _ in range(400):
        L = fit.sweep(Wt)
    assert squared_error(Wt - L, gram.matrix) < 1e-4 * squared_error(Wt, gram.matrix)
    torch.testing.assert_close(fit.hierarchy(gram).dense() * gram.scale, L, atol=1e-3, rtol=1e-3)


def test_one_level_equals_the_block_formula() -> None:
    weight = randn(12, 20).float()
    found = truncate(weight, HierarchyShape(12, 20, (3,)), None).dense()
    expected = weight.clone()
    for rows, columns in ((slice(0, 6), slice(10, 20)), (slice(6, 12), slice(0, 10))):
        U, s, V = torch.linalg.svd(weight[rows, columns], full_matrices=False)
        expected[rows, columns] = U[:, :3] * s[:3] @ V[:3]
    torch.testing.assert_close(found, expected)


def test_a_diagonal_gram_gives_the_block_formula_in_scaled_coordinates() -> None:
    """Then no block knows of another, and one converged sweep is the truncated SVD of every block."""
    weight, gram = randn(12, 20).float(), torch.eye(20)
    shape = HierarchyShape(12, 20, (2, 1))
    fit = HierarchicalFit(shape, gram)
    for _ in range(200):
        L = fit.sweep(weight)
    torch.testing.assert_close(L, truncate(weight, shape, None).dense(), atol=1e-3, rtol=1e-3)


def test_no_sweep_raises_the_objective_and_the_last_is_stationary() -> None:
    weight, gram = problem(24, 40, seed=3)
    Wt, fit = scaled(weight, gram), HierarchicalFit(SHAPE, gram.matrix)
    errors = [squared_error(Wt - fit.sweep(Wt), gram.matrix) for _ in range(300)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    # The gradient vanishes in every direction that leaves and factors have.
    hierarchy = fit.hierarchy(ScaledGram(torch.eye(40), (0.0, 0.0)))
    parts = {name: getattr(hierarchy, name).double().requires_grad_() for name in ("A", "B", "leaves")}
    E = Wt.double() - dataclasses.replace(hierarchy, **parts).dense()
    ((E @ gram.matrix.double()) * E).sum().backward()
    start = Wt.double() @ gram.matrix.double()
    assert all(float(part.grad.norm()) < 2e-2 * float(start.norm()) for part in parts.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orders_permute_the_problem(shape) -> None:
    weight, gram = problem(shape.out_features, shape.in_features, seed=2)
    rows, columns = random_orders(shape)
    Wt = scaled(weight, gram)
    fit = HierarchicalFit(shape, gram.matrix, (rows, columns))
    plain = HierarchicalFit(shape, gram.matrix[columns][:, columns])
    for _ in range(5):
        L, expected = fit.sweep(Wt), plain.sweep(Wt[rows][:, columns])
    torch.testing.assert_close(L[rows][:, columns], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fit.hierarchy(gram).dense() * gram.scale, L, atol=1e-3, rtol=1e-3)


def test_leaf_mask_is_where_leaves_are() -> None:
    for permuted in (False, True):
        hierarchy = random_hierarchy(SHAPE, permuted)
        ones = dataclasses.replace(
            hierarchy,
            A=torch.zeros_like(hierarchy.A),
            B=torch.zeros_like(hierarchy.B),
            leaves=torch.ones_like(hierarchy.leaves),
        )
        orders = (hierarchy.row_order.long(), hierarchy.column_order.long()) if permuted else None
        assert torch.equal(leaf_mask(SHAPE, orders, torch.device("cpu")), ones.dense().bool())


# -- reverse Cuthill-McKee


@needs_scipy
@pytest.mark.parametrize("shape", [(30, 30), (20, 44), (44, 20)])
def test_rcm_finds_a_hidden_band(shape: tuple[int, int]) -> None:
    rows, columns = (torch.arange(n) / n for n in shape)
    band = ((rows[:, None] - columns).abs() < 1.2 / min(shape)).float()
    shuffled = band[torch.randperm(shape[0])][:, torch.randperm(shape[1])]
    row_order, column_order = reverse_cuthill_mckee(shuffled, edges=float(band.sum()) / max(shape))
    found = shuffled[row_order][:, column_order]
    assert torch.equal(row_order.sort().values, torch.arange(shape[0]))
    assert torch.equal(column_order.sort().values, torch.arange(shape[1]))

    def width(matrix: torch.Tensor) -> float:
        i, j = matrix.nonzero(as_tuple=True)
        return float((i / shape[0] - j / shape[1]).abs().max())

    assert width(found) < 0.4 < width(shuffled)


# -- methods


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.9)], ids=str)
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_methods_keep_pattern_and_report_their_objective(name: str, pattern) -> None:
    weight, gram = problem(24, 40, seed=1)
    result = solve(name, weight, gram, pattern)
    pattern = pattern if METHODS[name].sparse else EMPTY
    assert int(result.mask.sum()) == pattern.kept(weight.shape) and pattern.allows(result.mask)
    assert not result.S[~result.mask].any()
    assert result.A is None and result.hierarchy.shape == SHAPE
    assert result.stats["objective"] == pytest.approx(objective(weight, result, gram), rel=1e-2)


def test_calibrated_beats_published() -> None:
    for seed in range(3):
        weight, gram = problem(24, 40, seed=seed)
        published, calibrated = (
            solve(name, weight, gram, Unstructured(0.7)).stats["objective"] for name in ("shss", "3basil")
        )
        assert calibrated < 0.7 * published


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.7)], ids=str)
def test_calibrated_settles_far_below_one_fit_of_what_wanda_leaves(pattern) -> None:
    for seed in range(3):
        weight, gram = problem(24, 40, seed=seed)
        Wt, fit = scaled(weight, gram), HierarchicalFit(SHAPE, gram.matrix)
        E = Wt * ~pattern.mask(Wt.abs())
        once = min(squared_error(E - fit.sweep(E), gram.matrix) for _ in range(40))
        method = METHODS["3basil"]
        stats = method.solve_hierarchical(weight, gram, pattern, SHAPE, None, method.options()).stats
        assert stats["converged"] and stats["objective"] < 0.15 * once


def test_published_is_the_largest_magnitudes_and_the_rest_factorised() -> None:
    weight, gram = problem(24, 40)
    result = solve("shss", weight, gram, Unstructured(0.8))
    largest = weight.abs() >= weight.abs().flatten().topk(int(result.mask.sum())).values[-1]
    assert torch.equal(result.S, weight * largest)
    expected = truncate(weight - result.S, SHAPE, None).dense()
    torch.testing.assert_close(result.hierarchy.dense(), expected)


def test_an_unstructured_s_keeps_out_of_the_leaves() -> None:
    weight, gram = problem(24, 40)
    result = solve("3basil", weight, gram, Unstructured(0.6))
    assert not (result.mask & leaf_mask(SHAPE, None, weight.device)).any()


@needs_scipy
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_rcm_orders_are_stored_and_undone(name: str) -> None:
    weight, gram = problem(24, 40)
    result = solve(name, weight, gram, Unstructured(0.5), permutation="rcm")
    assert result.hierarchy.row_order.dtype == torch.int32
    assert result.stats["objective"] == pytest.approx(objective(weight, result, gram), rel=1e-2)


@pytest.mark.parametrize("damping", [(0.005, 0.005), (0.0, 0.0)], ids=["damped", "undamped"])
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_dead_inputs_and_fewer_tokens_than_inputs(name: str, damping) -> None:
    for tokens in (1, 5, 100):
        inputs = randn(tokens, 40, seed=tokens).float()
        inputs[:, [0, 1, 2, 3, 9]] = 0
        gram = ScaledGram(inputs.T @ inputs, damping)
        dense = solve(name, randn(24, 40).float(), gram, NM(2, 4)).dense()
        assert torch.isfinite(dense).all() and not dense[:, [0, 1, 2, 3, 9]].any()


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_very_large_layers_are_solved_in_other_units(name: str) -> None:
    weight, gram = problem(24, 40)
    small, large = (solve(name, weight * size, gram, Unstructured(0.5)) for size in (1.0, 2.0**60))
    assert torch.equal(large.S, small.S * 2.0**60)
    torch.testing.assert_close(large.hierarchy.dense() / 2.0**60, small.hierarchy.dense())
    assert large.stats["objective"] == pytest.approx(small.stats["objective"] * 2.0**120, rel=1e-3)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_a_seed_gives_the_same_bits(name: str) -> None:
    weight, gram = problem(24, 40)
    first, second = (solve(name, weight, gram, Unstructured(0.5)).dense() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("permutation", [None, "rcm"])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=str)
def test_the_gpu_replays_sweeps_and_reaches_the_same_error(pattern, permutation: str | None) -> None:
    weight, shape, method = randn(64, 96, seed=3).float(), HierarchyShape(64, 96, (6, 3)), METHODS["3basil"]
    inputs = randn(800, 96, seed=4).float()
    found = []
    for device in ("cpu", "cuda"):
        W, gram = weight.to(device), ScaledGram((inputs.T @ inputs).to(device))
        result = method.solve_hierarchical(W, gram, pattern, shape, permutation, method.options(), 0)
        found.append(result.stats["objective"])
    assert found[1] == pytest.approx(found[0], rel=0.15)  # as far apart as two seeds
