"""Sparsity patterns: exact counts, the nearest matrix, and what `parse` refuses."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparselr.format.patterns import (
    MAX_M,
    NM,
    SAMPLE,
    Unstructured,
    parse,
    project,
    row_mask,
    sampled_threshold,
)

PAIRS = [(1, 2), (2, 3), (1, 4), (2, 4), (3, 4), (4, 8), (5, 10), (1, 16), (1, 32), (16, 32), (31, 32)]
FRACTIONS = [0, 0.0, 0.1, 1 / 3, 0.5, 0.57, 0.9, 0.999]


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def smallest_error(dense: torch.Tensor, pattern) -> float:
    """Over every support of a tiny matrix that the pattern's definition permits."""
    best = math.inf
    for bits in itertools.product([False, True], repeat=dense.numel()):
        mask = torch.tensor(bits).view(dense.shape)
        if isinstance(pattern, NM):
            legal = all(int(group.sum()) <= pattern.n for row in mask for group in row.split(pattern.m))
        else:
            legal = mask.numel() - int(mask.sum()) >= math.floor(pattern.sparsity * mask.numel())
        if legal:
            best = min(best, float((dense - dense * mask).double().square().sum()))
    return best


@pytest.mark.parametrize(("n", "m"), PAIRS)
@pytest.mark.parametrize("rows", [1, 5])
def test_n_of_m_keeps_exactly_n_in_every_group(n: int, m: int, rows: int) -> None:
    dense, pattern = random_matrix(rows, 3 * m), NM(n, m)
    projected, mask = project(dense, pattern)
    assert mask.dtype == torch.bool
    assert (mask.reshape(-1, m).sum(1) == n).all()
    assert pattern.kept(dense.shape) == int(mask.sum()) == rows * 3 * n
    assert torch.equal(projected, torch.where(mask, dense, 0))
    kept = dense.abs().masked_fill(~mask, math.inf).reshape(-1, m).min(1).values
    dropped = dense.abs().masked_fill(mask, 0).reshape(-1, m).max(1).values
    assert (kept >= dropped).all()


@pytest.mark.parametrize("sparsity", FRACTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (10, 10)])
def test_a_fraction_sets_exactly_that_many_entries_to_zero(sparsity: float, shape: tuple[int, int]) -> None:
    dense, pattern = random_matrix(*shape), Unstructured(sparsity)
    projected, mask = project(dense, pattern)
    zeros = math.floor(sparsity * shape[0] * shape[1])
    assert int((projected == 0).sum()) == int((~mask).sum()) == zeros
    assert pattern.kept(shape) == dense.numel() - zeros
    assert dense[mask].abs().min() >= dense.abs().masked_fill(mask, 0).max()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([NM(1, 2), NM(1, 4), NM(2, 4), NM(3, 4), Unstructured(0.3), Unstructured(0.75)]),
    st.lists(st.integers(-3, 3), min_size=8, max_size=8),
)
def test_projection_is_the_nearest_matrix(pattern, entries: list[int]) -> None:
    dense = torch.tensor(entries, dtype=torch.float32).view(2, 4)
    projected, mask = project(dense, pattern)
    assert float((dense - projected).square().sum()) == smallest_error(dense, pattern)
    assert int(mask.sum()) == pattern.kept((2, 4))  # exact even where the matrix is full of ties and zeros


@pytest.mark.parametrize(("n", "m"), PAIRS)
def test_ties_go_to_the_lower_index(n: int, m: int) -> None:
    mask = NM(n, m).mask(torch.ones(2, 2 * m))
    assert torch.equal(mask, (torch.arange(m) < n).repeat(2, 2))


def test_ties_are_the_same_every_time() -> None:
    scores = random_matrix(16, 16).round()
    masks = [Unstructured(0.5).mask(scores) for _ in range(3)]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])
    assert int(masks[0].sum()) == 128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_projection_keeps_dtype_and_kept_values(dtype: torch.dtype) -> None:
    dense = random_matrix(4, 8).to(dtype)
    projected, mask = project(dense, NM(2, 4))
    assert projected.dtype == dtype
    assert torch.equal(projected[mask], dense[mask])


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
def test_allows_counts_the_kept_entries(pattern) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0]]).bool()
    assert pattern.allows(mask)
    assert pattern.allows(torch.zeros(1, 8, dtype=torch.bool))
    mask[0, 2] = True
    assert not pattern.allows(mask)


def test_allows_looks_at_every_group() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    assert not NM(2, 4).allows(mask)
    assert NM(4, 8).allows(mask) and Unstructured(0.5).allows(mask)


def test_fits() -> None:
    assert NM(2, 4).fits((3, 8)) and not NM(2, 4).fits((8, 6))
    assert Unstructured(0.5).fits((3, 7))


@pytest.mark.parametrize(
    ("sparsity", "pattern", "text"),
    [
        ("2:4", NM(2, 4), "2:4"),
        (" 4 : 8 ", NM(4, 8), "4:8"),
        ("1:32", NM(1, 32), "1:32"),
        (0.5, Unstructured(0.5), "0.5"),
        (0, Unstructured(0.0), "0"),
        (0.999, Unstructured(0.999), "0.999"),
    ],
)
def test_parse(sparsity, pattern, text: str) -> None:
    assert parse(sparsity) == pattern
    assert str(pattern) == text


BAD_VALUES = ["", "2", ":", "4:4", "5:4", "0:4", "1:33", "2:4:8", "-1:4", "a:b", "1.5:4", "0.5"]
BAD_VALUES += [-0.1, 1, 1.0, 1.5, float("nan"), float("inf")]


@pytest.mark.parametrize(
    ("sparsity", "kind"),
    [(value, ValueError) for value in BAD_VALUES] + [(v, TypeError) for v in (None, True, [2, 4], (2, 4))],
)
def test_parse_names_field_value_and_allowed(sparsity, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        parse(sparsity)
    message = str(caught.value)
    assert message.startswith(f"sparsity={sparsity!r}")
    assert f"0 < n < m <= {MAX_M}" in message and "[0, 1)" in message


@pytest.mark.parametrize("kept", [0, 1, 4, 5, 6, 11, 14, 15])
def test_row_mask_spreads_the_remainder_over_the_best_rows(kept: int) -> None:
    scores = torch.tensor([[5.0, 4, 3], [9, 8, 7], [1, 2, 6], [0.5, 0.1, 0.2], [7.5, 0.3, 2.5]])
    mask = row_mask(scores, kept)
    share, spare = divmod(kept, 5)
    assert int(mask.sum()) == kept and set(mask.sum(1).tolist()) <= {share, share + 1}
    ranked = scores.sort(1, descending=True).values
    best = ranked[:, :share].sum() + (ranked[:, share].topk(spare).values.sum() if spare else 0)
    torch.testing.assert_close(scores[mask].sum(), best)


def test_row_mask_with_ties() -> None:
    mask = row_mask(torch.zeros(4, 5), 11)
    assert int(mask.sum()) == 11 and sorted(mask.sum(1).tolist()) == [2, 3, 3, 3]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 0.99])
@pytest.mark.parametrize("shape", [(1, 7), (31, 57), (64, 64)])
def test_the_threshold_of_a_small_matrix_is_exact(shape: tuple[int, int], sparsity: float) -> None:
    scores, pattern = random_matrix(*shape).abs(), Unstructured(sparsity)
    assert torch.equal(scores > pattern.threshold(scores), pattern.mask(scores))


@pytest.mark.parametrize("sparsity", [0.5, 0.73, 0.95])
@pytest.mark.parametrize("kind", ["plain", "outlier columns", "dead columns", "equal rows"])
def test_the_threshold_of_a_large_matrix_keeps_nearly_what_it_should(kind: str, sparsity: float) -> None:
    shape = (1024, 3072)  # three times the sample: every third entry would be that of every third column
    scores = random_matrix(*shape).abs()
    if kind == "outlier columns":
        scores[:, ::3] *= 10
    if kind == "dead columns":
        scores[:, ::4] = 0
    if kind == "equal rows":
        scores[512:] = scores[:512]
    pattern = Unstructured(sparsity)
    mask = scores > sampled_threshold(scores, scores.numel() - pattern.kept(shape))
    assert scores.numel() > 2 * SAMPLE
    assert abs(int(mask.sum()) - pattern.kept(shape)) < 2e-4 * scores.numel()
    assert scores[mask].min() > scores[~mask].max()


@pytest.mark.parametrize("guess", [0.5, 0.998, 1.0, 1.002, 2.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_a_guess_changes_no_threshold(sparsity: float, guess: float) -> None:
    scores, pattern = random_matrix(64, 64).abs(), Unstructured(sparsity)
    exact = pattern.threshold(scores)
    assert torch.equal(pattern.threshold(scores, guess * float(exact) if sparsity else guess), exact)


def test_the_threshold_drops_ties_at_zero() -> None:
    scores, pattern = random_matrix(32, 32).abs(), Unstructured(0.5)
    scores[:, :24] = 0
    assert torch.equal(scores > pattern.threshold(scores), scores > 0)
    assert not (torch.zeros(8, 8) > pattern.threshold(torch.zeros(8, 8))).any()
