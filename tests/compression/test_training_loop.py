"""The loop that transformer matching and distillation share, on a small least-squares problem."""

import itertools
import math

import pytest
import torch
from torch import nn

from hf_sparselr.compression.optimizers import by_size, make_optimizer
from hf_sparselr.compression.training_loop import keep_back, train
from hf_sparselr.config.options import TMOptions


class Pull(nn.Module):
    """A vector that is pulled to a target."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(3))


def pulled(judge, passes: int, steps: int = 2, **options):
    """Trains towards (1, 1, 1): what was done, the vector, and its values after every pass."""
    model, seen = Pull(), []

    def backward(batch: float, size: float) -> torch.Tensor:
        loss = (model.place - 1).square().sum() / size
        loss.backward()
        return loss.detach()

    def judged() -> float:
        seen.append(model.place.detach().clone())
        return judge(len(seen), model.place.detach())

    groups = {"S": [model.place], "factors": [], "vectors": []}
    batches = [[1.0]] * steps
    chosen = TMOptions(passes=passes, **{"lr": 0.01, "final_lr": 1.0, **options})
    done = train(model, groups, batches, len, backward, chosen, (0.9, 0.9), 0, lambda _: None, judged)
    return done, model.place.detach(), seen


def test_the_best_judged_state_is_left() -> None:
    shares = [0.9, 0.5, 0.7, 0.6]
    done, place, seen = pulled(lambda number, _: shares[number - 1], passes=4)
    assert done.best_pass == 2 and torch.equal(place, seen[1])
    assert done.judged == shares and len(done.losses) == 4


@pytest.mark.parametrize(("loss", "passes"), [(1.0, 3), (1.6, 3), (math.inf, 1)])
def test_the_start_is_left_where_nothing_helps(loss: float, passes: int) -> None:
    done, place, seen = pulled(lambda *_: loss, passes=10)
    assert done.best_pass == 0 and torch.equal(place, torch.zeros(3))
    assert len(seen) == passes  # the third pass without a gain is the last


def test_training_goes_on_from_a_pass_that_is_somewhat_worse() -> None:
    shares = [1.3, 0.9, 1.1, 0.7]
    done, place, seen = pulled(lambda number, _: shares[number - 1], passes=4)
    moves = [float((after - before).mean()) for before, after in itertools.pairwise([torch.zeros(3), *seen])]
    assert moves == pytest.approx([0.02, 0.01, 0.01, 0.005], rel=0.03)  # smaller steps after the first and the third
    assert torch.equal(place, seen[3]) and done.best_pass == 4


def test_a_pass_that_is_much_worse_is_undone_and_step_sizes_are_halved() -> None:
    done, _, seen = pulled(lambda number, _: [0.9, 1.4, 0.8, 1.3, 0.7][number - 1], passes=5)
    moves = [seen[0], seen[1] - seen[0], seen[2] - seen[0], seen[3] - seen[2], seen[4] - seen[2]]
    sizes = [float(move.abs().mean()) for move in moves]
    # Under a constant gradient Adam moves by the step size: 0.01 in each of the two steps of a pass.
    assert sizes == pytest.approx([0.02, 0.02, 0.01, 0.01, 0.005], rel=0.03)
    assert done.best_pass == 5


def test_training_ends_with_its_third_miss() -> None:
    done, place, seen = pulled(lambda number, _: [0.9, 1.4, 0.8, 0.81, 0.82, 0.1][number - 1], passes=6)
    assert len(done.judged) == len(seen) == 5
    assert done.best_pass == 3 and torch.equal(place, seen[2])


@pytest.mark.parametrize(("final", "last"), [(1.0, 0.01), (0.2, 0.002)])
def test_step_sizes_follow_a_cosine(final: float, last: float) -> None:
    _, _, seen = pulled(lambda number, _: 1 / (1 + number), passes=5, steps=1, final_lr=final)
    moves = [float((b - a).mean()) for a, b in zip([torch.zeros(3), *seen], seen, strict=False)]
    expected = [0.01 * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / 5))) for step in range(5)]
    assert moves == pytest.approx(expected, rel=0.03)
    assert moves[0] > moves[-1] > last or final == 1


@pytest.mark.parametrize(("count", "kept"), [(7, 0), (8, 1), (31, 1), (32, 2), (128, 8)])
def test_windows_are_kept_back_all_over_the_list(count: int, kept: int) -> None:
    trained, judging = keep_back(list(range(count)))
    assert sorted([*trained, *judging]) == list(range(count)) and trained == sorted(trained)
    assert len(judging) == kept
    gaps = [b - a for a, b in zip([-count // (2 * kept), *judging], judging, strict=False)] if kept else []
    assert all(abs(gap - count / kept) <= 1 for gap in gaps)


def test_relative_step_sizes_follow_the_nonzero_entries() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(64, 64)
    sparse = torch.where(torch.rand(64, 64) < 0.3, matrix, 0.0)
    groups = {
        "S": [nn.Parameter(sparse), nn.Parameter(sparse * 8), nn.Parameter(torch.zeros(4, 4))],
        "factors": [nn.Parameter(matrix * 8)],
        "vectors": [nn.Parameter(torch.zeros(8)), nn.Parameter(torch.full((8,), 4.0))],
    }
    options = TMOptions(lr=0.1, factor_lr=0.5, relative_lr=True)
    rates = {
        id(p): group["lr"]
        for group in make_optimizer(groups, options, (0.9, 0.9)).param_groups
        for p in group["params"]
    }
    found = [rates[id(p)] for own in groups.values() for p in own]
    assert found == pytest.approx([0.1, 0.8, 1e-4, 0.4, 2e-3, 0.4], rel=2**0.25 - 1)
    assert len(by_size([nn.Parameter(matrix * scale) for scale in (1.0, 1.02, 8.0)], 1e-3)) == 2


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_relative_steps_move_weights_of_any_size_by_the_same_share(scale: float) -> None:
    class Scaled(Pull):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.full((3,), scale))

    model = Scaled()

    def backward(batch: float, size: float) -> torch.Tensor:
        loss = (model.place / scale - 2).square().sum()
        loss.backward()
        return loss.detach()

    options = TMOptions(passes=1, lr=0.01, relative_lr=True)
    train(model, {"S": [model.place]}, [[1.0]], len, backward, options, (0.9, 0.9), 0, lambda _: None, lambda: 0.5)
    share = float((model.place.detach() / scale - 1).mean())
    assert 0.01 / 2**0.25 <= share <= 0.01 * 2**0.25 + 1e-6
