"""Replayed functions: on the CPU the function itself, on a GPU the same results from a graph."""

import gc
import logging
import weakref

import pytest
import torch

from hf_sparselr.utils.cuda_graphs import GraphedCallable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_every_call_computes_on_its_own_arguments() -> None:
    calls = []

    def function(pair: tuple[torch.Tensor, torch.Tensor], factor: int) -> dict[str, torch.Tensor]:
        calls.append(factor)
        return {"sum": (pair[0] + pair[1]) * factor}

    graphed = GraphedCallable(function, DEVICE)
    results = []
    for size, factor in ((4, 2), (4, 2), (4, 2), (4, 3), (6, 2), (4, 2)):
        pair = torch.randn(size, device=DEVICE), torch.randn(size, device=DEVICE)
        results.append((graphed(pair, factor)["sum"], (pair[0] + pair[1]) * factor))
    for found, expected in results:  # after all calls: a later one must not overwrite an earlier result
        assert torch.equal(found, expected)
    assert len(calls) == (6 if DEVICE.type == "cpu" else 4)  # two shapes and two factors, one of them captured


def train(graphed: bool) -> torch.Tensor:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16, device=DEVICE)
    rate = torch.tensor(1e-2, device=DEVICE)
    options = {"fused": True, "capturable": True} if DEVICE.type == "cuda" else {}
    optimizer = torch.optim.Adam([{"params": layer.parameters(), "lr": rate}], **options)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()

    run = GraphedCallable(step, DEVICE) if graphed else step
    for index in range(6):
        run(torch.randn(8, 16, generator=torch.Generator().manual_seed(index)).to(DEVICE))
        rate.mul_(0.5)
    return layer.weight.detach()


def test_a_training_step_is_the_same_step() -> None:
    """The optimiser's state is made in the first call; the step size changes between calls."""
    torch.testing.assert_close(train(graphed=True), train(graphed=False), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_what_looks_at_its_results_is_called_as_it_is(caplog) -> None:
    graphed = GraphedCallable(lambda x: x * float(x.sum()), DEVICE)
    with caplog.at_level(logging.INFO, "hf_sparselr"):
        for _ in range(4):
            x = torch.randn(5, device=DEVICE)
            assert torch.equal(graphed(x), x * float(x.sum()))
    assert "not replayed as a CUDA graph" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("calls", [1, 3])
def test_what_a_replayed_function_holds_is_free_at_once(calls: int) -> None:
    held = torch.zeros(5, device=DEVICE)
    graphed, alive = GraphedCallable(held.add, DEVICE), weakref.ref(held)
    for _ in range(calls):
        graphed(torch.ones(5, device=DEVICE))
    gc.disable()
    try:
        del graphed, held
        assert alive() is None
    finally:
        gc.enable()
