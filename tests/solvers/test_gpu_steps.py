"""The N:M step of the iteration in Triton, compiled on a GPU, else by Triton's interpreter (see conftest)."""

import pytest
import torch
from helpers.kernel_cases import DEVICE

from hf_sparselr.format.patterns import NM
from hf_sparselr.solvers.gram import ScaledGram
from hf_sparselr.solvers.threebasil.admm import Admm, _sparse

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
    T, W, E = draw(kind, 3, *shape).to(DEVICE)
    mask = draw("ties", *shape).to(DEVICE) > 0
    expected, support = T.clone(), mask.clone()
    _sparse(expected, support, W, E, pattern)
    gpu_steps.move(T, mask, W, E, pattern)
    assert torch.equal(bits(T), bits(expected)) and torch.equal(mask, support)


def test_what_is_not_in_triton_is_left_to_torch() -> None:
    assert not any(map(gpu_steps.supports, (None, NM(5, 6), NM(2, 32))))


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
    assert torch.equal(in_triton.T, in_torch.T) and torch.equal(in_triton.mask, in_torch.mask)


@pytest.mark.gpu
def test_a_machine_on_which_triton_fails_is_told(monkeypatch, caplog) -> None:
    def fail(*_) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(gpu_steps, "move", fail)
    assert not gpu_steps._compiles.__wrapped__() and "no C compiler" in caplog.text
