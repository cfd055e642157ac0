"""The N:M step of the iteration in Triton, compiled on a GPU, else by Triton's interpreter (see conftest)."""

import pytest
import torch
from helpers.kernel_cases import DEVICE

from hf_sparselr.format.patterns import NM
from hf_sparselr.solvers.base import inverse_factors
from hf_sparselr.solvers.gram import ScaledGram
from hf_sparselr.solvers.threebasil.admm import Admm, _correction, _sparse

gpu_steps = pytest.importorskip("hf_sparselr.solvers.threebasil.gpu_steps")

PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(1, 2), NM(2, 16)]


def draw(kind: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=generator).float()
    if kind == "random":
        return torch.randn(*shape, generator=generator)
    if kind == "extremes":
        values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, 3e38])
        return values[torch.randint(len(values), shape, generator=generator)]
    return torch.full(shape, float(kind))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(values.isnan(), torch.nan).view(torch.int32)  # NaN has many, by device


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN and overflow
@pytest.mark.parametrize("kind", ["random", "ties", "extremes", "0", "1"])
@pytest.mark.parametrize("groups", [(1, 1), (3, 7), (5, 129)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_step_is_that_of_torch(pattern: NM, groups: tuple[int, int], kind: str) -> None:
    shape = groups[0], groups[1] * pattern.m
    T, W, E, L = draw(kind, 4, *shape).to(DEVICE)
    mask = draw("ties", *shape).to(DEVICE) > 0
    moved, kept = T.clone(), mask.clone()
    expected, support = T.clone(), mask.clone()
    _sparse(expected, support, W, E, pattern)
    gpu_steps.move(T, mask, W, E, pattern)
    assert torch.equal(bits(T), bits(expected)) and torch.equal(mask, support)
    rho = torch.tensor(0.3, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        first, second, Z = moved.clone(), kept.clone(), torch.empty_like(W, dtype=dtype)
        gpu_steps.move_and_correct(first, second, W, E, L, rho, Z, pattern)
        assert torch.equal(bits(first), bits(expected)) and torch.equal(second, support)
        correction = _correction(expected, support, W, L, rho, dtype).float()
        if dtype == torch.float32 or DEVICE == "cuda":
            assert torch.equal(bits(Z.float()), bits(correction))
        else:  # the interpreter rounds to BF16 by cutting digits off
            torch.testing.assert_close(Z.float(), correction, rtol=2**-7, atol=1e-30, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["random", "extremes"])
@pytest.mark.parametrize("shape", [(1, 3), (40, 77)], ids=str)
def test_steps_without_a_pattern_are_those_of_torch(shape: tuple[int, int], kind: str) -> None:
    T, W, E, L = draw(kind, 4, *shape).to(DEVICE)
    mask = draw("ties", *shape).to(DEVICE) > 0
    rho = torch.tensor(0.3, device=DEVICE)
    correction = torch.empty_like(W)
    gpu_steps.correction(T, mask, W, L, rho, correction)
    assert torch.equal(bits(correction), bits(_correction(T, mask, W, L, rho, torch.float32)))
    expected = T.clone()
    _sparse(expected, mask, W, E, None)
    gpu_steps.move(T, mask, W, E, None)
    assert torch.equal(bits(T), bits(expected))
    gpu_steps.stiffen(T, mask, 1.1)
    stiffer = torch.where(mask, expected, expected / 1.1)  # on a GPU torch multiplies by 1 / 1.1
    torch.testing.assert_close(T, stiffer, rtol=1e-6, atol=1e-40, equal_nan=True)


def test_what_is_not_in_triton_is_left_to_torch() -> None:
    assert not any(map(gpu_steps.supports, (NM(5, 6), NM(2, 32))))


@pytest.mark.gpu
@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_replayed_iterations_are_those_of_torch(pattern: NM, device: int, monkeypatch) -> None:
    def run() -> Admm:
        generator = torch.Generator().manual_seed(0)
        X, W = torch.randn(200, 48, generator=generator), torch.randn(24, 48, generator=generator)
        gram = ScaledGram((X.T @ X).to(device))
        run = Admm([W.to(device)], gram, [pattern], [2], 0.1, 0, "fp32")
        for _ in range(3):  # compiled, captured, replayed
            run.run(5)
        return run

    in_triton = run()
    monkeypatch.setattr(gpu_steps, "supports", lambda pattern: False)
    in_torch = run()
    assert torch.equal(in_triton.mask, in_torch.mask)
    torch.testing.assert_close(in_triton.T, in_torch.T, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_machine_on_which_triton_fails_is_told(monkeypatch, caplog) -> None:
    def fail(*_) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(gpu_steps, "move", fail)
    assert not gpu_steps._compiles.__wrapped__() and "no C compiler" in caplog.text


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of zero columns
@pytest.mark.parametrize(("rank", "count", "batch"), [(16, 3, 1), (5, 2, 1), (1, 1, 2), (40, 1, 2)])
def test_inverse_factors_are_those_of_torch(rank: int, count: int, batch: int) -> None:
    Y = torch.randn(batch * count, 100, rank, generator=torch.Generator().manual_seed(0))
    Y[:, :, 0] *= 1e4
    Y[0, :, rank // 2] = 0
    blocks = Y.mT @ Y
    C = torch.stack([torch.block_diag(*part) for part in blocks.split(count)]).to(DEVICE)
    expected = torch.stack([torch.block_diag(*part) for part in inverse_factors(blocks).split(count)])
    found = gpu_steps.inverse_factors(C, count).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_dependent_columns_come_out_short() -> None:
    Y = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    Y[:, 5] = 2 * Y[:, 3]
    found = Y @ gpu_steps.inverse_factors((Y.T @ Y)[None].to(DEVICE), 1)[0].T.cpu()
    lengths = found.norm(dim=0)
    assert float(lengths[5]) < 0.1 and all(0.99 < float(length) < 1.001 for length in lengths[6:])


@pytest.mark.parametrize("ranks", [(2, 2), (3, 0)], ids=str)
def test_joined_steps_are_the_single_ones(ranks: tuple[int, int], monkeypatch) -> None:
    def run() -> Admm:
        generator = torch.Generator().manual_seed(0)
        X, *weights = (torch.randn(rows, 48, generator=generator) for rows in (200, 24, 8))
        gram = ScaledGram((X.T @ X).to(DEVICE))
        run = Admm([W.to(DEVICE) for W in weights], gram, [NM(2, 4)] * 2, list(ranks), 0.1, 0, "fp32")
        run.run(3)  # an odd number of steps, too, ends with L in its place
        run.raise_rho(1.05)
        run.run(4)
        return run

    monkeypatch.setattr(Admm, "_in_triton", lambda self, pattern=None: True)
    joined = run()
    monkeypatch.setattr(Admm, "_in_triton", lambda self, pattern=None: False)
    single = run()
    assert torch.equal(joined.mask, single.mask)
    for name in ("T", "L"):
        torch.testing.assert_close(getattr(joined, name), getattr(single, name), rtol=1e-4, atol=1e-4)
