"""Budgets, OWL and the global allocation: exact counts, optimal spending, and what the pipeline makes of them."""

import itertools
import json
import math

import pytest
import torch
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparselr import compress
from hf_sparselr.compression.allocation import (
    DenseGroup,
    Point,
    allocate,
    candidates,
    lower_hull,
    outlier_count,
    owl_sparsities,
    refined,
    spend,
)
from hf_sparselr.compression.model_structure import find_stacks
from hf_sparselr.compression.plan import Layer, plan_layers
from hf_sparselr.compression.report import Report
from hf_sparselr.config.options import GlobalOptions, OwlOptions, budget_pattern, budget_rank
from hf_sparselr.format.patterns import EMPTY, NM, Unstructured
from hf_sparselr.nn.linear import packed_layers
from hf_sparselr.solvers.gram import ScaledGram

QUICK = {"iterations": 3, "spread": 0.1, "rank_floor": 0.5, "rank_ceiling": 2}
NARROW = GlobalOptions(**QUICK)


def kept_parameters(model) -> int:
    """Nonzeros and factor entries of a packed model."""
    layers = packed_layers(model).values()
    return sum(layer.values.numel() + layer.rank * (layer.in_features + layer.out_features) for layer in layers)


# -- budgets


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (17, 33), (4096, 14336)])
@pytest.mark.parametrize(("c", "k"), [(0.5, 0.25), (0.5, 0.0), (0.3, 0.5), (0.9, 0.1), (0.01, 0.99)])
def test_a_budget_is_kept_up_to_one_rank(shape, c, k):
    pattern, rank = budget_pattern(c, k), budget_rank(c, k, shape)
    size, side = math.prod(shape), sum(shape)
    kept = pattern.kept(shape) + rank * side
    assert (1 - c) * size - side < kept <= (1 - c) * size + 1
    assert pattern.sparsity == pytest.approx(c + k - c * k)
    assert rank == math.floor(k * (1 - c) * size / side) < min(shape)


def test_published_settings_of_a_budget():
    assert budget_pattern(0.5, 0.25) == Unstructured(0.625)
    assert budget_rank(0.5, 0.25, (4096, 4096)) == 256


def test_a_compressed_model_keeps_its_budget():
    model = compress(tiny.build("llama"), tiny.settings(sparsity=None, rank=None, compression=0.5))
    rows = {row["name"]: row for row in model.sparselr_report.layers}
    sizes = {name: math.prod(row["shape"]) for name, row in rows.items()}
    sides = {name: sum(row["shape"]) for name, row in rows.items()}
    assert all(row["pattern"] == "0.625" for row in rows.values())
    assert {row["rank"] for row in rows.values()} == {1, 2}  # 16 x 32, 32 x 32 and 64 x 32
    assert sum(sizes.values()) / 2 - sum(sides.values()) < kept_parameters(model) <= sum(sizes.values()) / 2


def test_a_budget_that_leaves_nothing_of_a_layer_is_found_early():
    changes = {"method": "svd", "method_options": None, "sparsity": None, "rank": None, "compression": 0.97}
    with pytest.raises(ValueError, match=r"k_proj: a budget this small gives its weight 16 x 32 neither S nor"):
        plan_layers(tiny.build("llama"), tiny.settings(**changes, ignore=["q_proj"]))
    plan = plan_layers(tiny.build("llama"), tiny.settings(**{**changes, "compression": 0.9}))
    assert all(layer.rank > 0 for layer in plan.values())


@pytest.mark.parametrize(("kept", "size"), [(0, 7), (1, 7), (6, 7), (7, 7), (3, 10**9 + 7), (10**9, 10**9 + 7)])
def test_a_pattern_that_keeps_a_number(kept, size):
    assert Unstructured.keeping(kept, size).kept((1, size)) == kept


# -- OWL


def test_outliers_are_scores_far_above_the_mean():
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 7.0]])
    gram = torch.diag(torch.tensor([1.0, 1.0, 4.0]))  # scores 1 1 0 / 1 1 14, mean 3
    assert [outlier_count(weight, gram, threshold) for threshold in (0.1, 1, 4, 5)] == [5, 1, 1, 0]


ratios = st.lists(st.tuples(st.floats(0, 0.2), st.integers(1, 1000)), min_size=1, max_size=8)


@given(ratios, st.floats(0.1, 0.9), st.floats(0.01, 0.09))
@settings(max_examples=100, deadline=None)
def test_owl_keeps_the_mean_and_the_range(blocks, sparsity, spread):
    ratio = {str(index): value for index, (value, _) in enumerate(blocks)}
    size = {str(index): value for index, (_, value) in enumerate(blocks)}
    found = owl_sparsities(ratio, size, sparsity, spread)
    mean = sum(found[block] * size[block] for block in found) / sum(size.values())
    assert mean == pytest.approx(sparsity, abs=1e-9)
    assert all(abs(value - sparsity) <= spread + 1e-9 for value in found.values())
    order = sorted(ratio, key=ratio.get)
    assert all(found[a] >= found[b] - 1e-9 for a, b in itertools.pairwise(order))


def test_owl_uses_the_whole_range():
    found = owl_sparsities({"a": 0.0, "b": 0.01, "c": 0.05}, {"a": 2, "b": 2, "c": 2}, 0.5, 0.08)
    assert found["c"] == pytest.approx(0.42) and found["a"] == pytest.approx(0.5 + 0.08 * 2 / 3)
    assert owl_sparsities({"a": 0.1, "b": 0.1}, {"a": 1, "b": 2}, 0.5, 0.08) == {"a": 0.5, "b": 0.5}


def spiky(model):
    """The second block gets outliers: of every weight, one in twenty times 30."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.model.layers[1].parameters():
        if parameter.ndim == 2:
            chosen = torch.rand(parameter.shape, generator=generator) < 0.05
            parameter.data[chosen] *= 30
    return model


def test_owl_keeps_more_of_the_block_with_outliers():
    model = spiky(tiny.build("llama"))
    uniform = kept_parameters(compress(spiky(tiny.build("llama")), tiny.settings(sparsity=0.5)))
    overrides = {r"layers\.1\..*down_proj": {"sparsity": 0.9}, r"layers\.0\..*q_proj": {"rank": 1}}
    options = {"spread": 0.1, "outlier_threshold": 4}
    config = tiny.settings(sparsity=0.5, allocation="owl", allocation_options=options)
    compress(model, config)
    report = model.sparselr_report
    first, second = (report.layers[0]["sparsity"], report.layers[-1]["sparsity"])
    assert first == pytest.approx(0.6, abs=1e-3) and second == pytest.approx(0.4, abs=1e-3)
    assert abs(kept_parameters(model) - uniform) <= len(report.layers)  # each layer's count is floored
    ratios = list(report.allocation["outlier_ratio"].values())
    assert ratios[1] > 10 * ratios[0]

    config = tiny.settings(sparsity=0.5, allocation="owl", allocation_options=options, overrides=overrides)
    rows = {row["name"]: row for row in compress(spiky(tiny.build("llama")), config).sparselr_report.layers}
    assert rows["model.layers.1.mlp.down_proj"]["pattern"] == "0.9"
    assert rows["model.layers.0.self_attn.q_proj"]["rank"] == 1
    assert rows["model.layers.0.self_attn.q_proj"]["pattern"] != "0.5"


# -- spending a budget


# random curves of a layer 10 x 10: nonzeros and error, not convex
curves = st.dictionaries(st.integers(1, 60), st.floats(0.01, 10), min_size=1, max_size=4).map(
    lambda points: [Point((10, 10), kept, 0, error) for kept, error in points.items()]
)


@given(curves)
@settings(max_examples=200, deadline=None)
def test_the_hull_is_convex_and_below_all_points(points):
    hull = lower_hull(points)
    assert set(hull) <= set(points)
    assert hull[0].parameters == min(point.parameters for point in points)
    slopes = [
        (right.error - left.error) / (right.parameters - left.parameters) for left, right in itertools.pairwise(hull)
    ]
    assert slopes == sorted(slopes) and all(slope < 0 for slope in slopes)
    for point in points:
        assert error_on(hull, point.parameters) <= point.error * (1 + 1e-12)


def error_on(hull: list[Point], parameters: int) -> float:
    """The curve's error at a number of parameters, flat after its end."""
    for left, right in itertools.pairwise(hull):
        if left.parameters <= parameters <= right.parameters:
            share = (parameters - left.parameters) / (right.parameters - left.parameters)
            return left.error + share * (right.error - left.error)
    return hull[0].error if parameters <= hull[0].parameters else hull[-1].error


@given(st.lists(curves, min_size=1, max_size=3), st.integers(0, 120))
@settings(max_examples=200, deadline=None)
def test_spending_is_optimal(layers, extra):
    """Never worse than the best of all combinations of vertices, and equal to it where no step was cut."""
    hulls = {str(index): lower_hull(points) for index, points in enumerate(layers)}
    budget = sum(hull[0].parameters for hull in hulls.values()) + extra
    chosen = spend(hulls, budget)
    assert sum(point.parameters for point in chosen.values()) <= budget
    affordable = [
        combination
        for combination in itertools.product(*hulls.values())
        if sum(point.parameters for point in combination) <= budget
    ]
    best = min(sum(point.error for point in combination) for combination in affordable)
    error = sum(point.error for point in chosen.values())
    assert error <= best * (1 + 1e-9)
    if all(point in hulls[name] for name, point in chosen.items()):
        assert error == pytest.approx(best)


def test_a_cut_step_goes_between_both_settings_and_is_rounded_down():
    hull = [Point((10, 20), 40, 8, 3.0), Point((10, 20), 101, 7, 2.0)]  # 280 and 311 parameters
    point = spend({"layer": hull}, 300)["layer"]
    assert (point.kept, point.rank) == (40 + 39, 7) and point.parameters <= 300
    assert point.error == pytest.approx(3 - 20 / 31)


def test_points_between_the_measured_ones():
    corners = {(10, 0): 1.0, (30, 0): 0.01, (10, 4): 0.1, (30, 4): 0.001}
    points = [Point((8, 8), kept, rank, error) for (kept, rank), error in corners.items()]
    fine = {(point.kept, point.rank): point.error for point in refined(points, steps=2)}
    assert fine.keys() == {(kept, rank) for kept in (10, 20, 30) for rank in (0, 2, 4)}
    assert all(fine[key] == pytest.approx(error) for key, error in corners.items())
    assert fine[20, 0] == pytest.approx(0.1) and fine[20, 2] == pytest.approx(0.1 * math.sqrt(0.1))
    assert refined(points[:1]) == points[:1]


@pytest.mark.parametrize(
    ("pattern", "own", "expected"),
    [
        (Unstructured(0.5), {}, {(kept, rank) for kept in (410, 512, 614) for rank in (2, 4, 8)}),
        (Unstructured(0.5), {"rank": 4}, {(410, 4), (512, 4), (614, 4)}),
        (Unstructured(0.5), {"sparsity": 0.5}, {(512, 2), (512, 4), (512, 8)}),
        (NM(2, 4), {}, {(512, 2), (512, 4), (512, 8)}),
        (Unstructured(0.95), {}, {(kept, rank) for kept in (1, 52, 154) for rank in (2, 4, 8)}),
        (Unstructured(0.0), {}, {(kept, rank) for kept in (922, 1024) for rank in (2, 4, 8)}),
        (EMPTY, {}, {(0, 2), (0, 4), (0, 8)}),
    ],
)
def test_floors_and_ceilings(pattern, own, expected):
    assert set(candidates(Layer("x", pattern, 4), own, (32, 32), NARROW)) == expected


def test_ranks_stay_below_both_sides_and_zero_stays_zero():
    options = GlobalOptions(rank_ceiling=10, rank_floor=0)
    assert {rank for _, rank in candidates(Layer("x", NM(2, 4), 5), {}, (16, 32), options)} == {0, 5, 15}
    assert {rank for _, rank in candidates(Layer("x", NM(2, 4), 0), {}, (16, 32), options)} == {0}
    assert {rank for _, rank in candidates(Layer("x", EMPTY, 5), {}, (16, 32), options)} == {1, 5, 15}


# -- the global allocation


def global_settings(**changes):
    return tiny.settings(allocation="global", allocation_options=QUICK, **changes)


GLOBAL = [
    {"sparsity": 0.5},
    {"sparsity": "2:4"},
    {"sparsity": 0.7, "rank": 0},
    {"sparsity": None, "rank": None, "compression": 0.5},
    {"sparsity": None, "rank": None, "compression": 0.25, "method": "svd", "method_options": None},
    {
        "sparsity": 0.5,
        "overrides": {"down_proj": {"sparsity": "2:4"}, "q_proj": {"rank": 3, "sparsity": 0.25}},
    },
]


@pytest.mark.parametrize("changes", GLOBAL)
def test_global_keeps_the_budget_and_beats_uniform(changes):
    uniform = compress(tiny.build("llama"), tiny.settings(**changes))
    model = compress(tiny.build("llama"), global_settings(**changes))
    report, before = model.sparselr_report, {row["name"]: row for row in uniform.sparselr_report.layers}
    totals = report.allocation["parameters"]
    assert kept_parameters(model) <= kept_parameters(uniform)
    sides = max(sum(row["shape"]) for row in report.layers)
    assert totals["uniform"] - 2 * sides < totals["allocated"] <= totals["uniform"]  # one step is rounded down
    assert report.allocation["error"]["allocated"] < report.allocation["error"]["uniform"]
    for row in report.layers:
        own = model.config.quantization_config.override_of(row["name"])
        was = before[row["name"]]
        assert row["rank"] == was["rank"] if "rank" in own else was["rank"] // 2 <= row["rank"] <= was["rank"] * 2
        if "sparsity" in own or changes["sparsity"] == "2:4":
            assert row["pattern"] == was["pattern"] and row["sparsity"] == was["sparsity"]
        assert abs(row["sparsity"] - was["sparsity"]) < NARROW.spread + 1e-3
    assert len({(row["pattern"], row["rank"]) for row in report.layers}) > 4


def groups_of(weights: dict[str, torch.Tensor], losses: dict[str, float]):
    """One group a layer; the loss is |change|^2 times a layer's own factor."""
    for name, weight in weights.items():
        gram = torch.eye(weight.shape[1])

        def loss(layer, new, weight=weight):
            return losses[layer] * float((weight - new).square().sum())

        yield DenseGroup("block", {name: weight}, gram, ScaledGram(gram), loss)


def test_parameters_go_where_the_block_loses_most():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(32, 32, generator=generator) for name in ("a", "b", "c")}
    config = global_settings(sparsity=0.5)
    plan = {name: Layer(name, Unstructured(0.5), 4) for name in weights}
    found, _ = allocate(config, plan, groups_of(weights, {"a": 1.0, "b": 10.0, "c": 0.1}))
    kept = {name: layer.pattern.kept((32, 32)) + 64 * layer.rank for name, layer in found.items()}
    assert kept["c"] < kept["a"] < kept["b"]
    assert 3 * 768 - 128 < sum(kept.values()) <= 3 * 768
    same, _ = allocate(config, plan, groups_of({"a": weights["a"], "b": weights["a"]}, {"a": 1.0, "b": 1.0}))
    assert abs(same["a"].pattern.kept((32, 32)) - same["b"].pattern.kept((32, 32))) <= 64


def test_without_a_sparse_part_ranks_move():
    left, right = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    weights = {"low": left[:, :2] @ right[:2], "high": left @ right}  # rank 2 is all that the first has
    plan = {name: Layer(name, EMPTY, 4) for name in weights}
    found, summary = allocate(global_settings(), plan, groups_of(weights, {"low": 1.0, "high": 1.0}))
    assert (found["low"].pattern, found["low"].rank) == (EMPTY, 2)
    assert (found["high"].pattern, found["high"].rank) == (EMPTY, 6)
    assert summary["parameters"] == {"uniform": 8 * 64, "allocated": 8 * 64}


def test_uniform_does_not_read_the_model():
    plan = {"a": Layer("a", NM(2, 4), 4)}
    assert allocate(tiny.settings(), plan, iter(())) == (plan, {})


@pytest.mark.parametrize("name", ["gpt2", "t5", "qwen2"])
@pytest.mark.parametrize("allocation", ["owl", "global"])
def test_families(name, allocation):
    options = QUICK if allocation == "global" else {"outlier_threshold": 3}
    config = tiny.settings(sparsity=0.5, allocation=allocation, allocation_options=options)
    model = tiny.build(name)
    weights = tiny.snapshot(model)
    planned = plan_layers(model, config)
    stacks = [name for blocks in find_stacks(model).values() for name in blocks]
    compress(model, config)
    assert packed_layers(model).keys() == planned.keys()
    if allocation == "owl":
        assert list(model.sparselr_report.allocation["sparsity"]) == stacks
    dense = {key for key in weights if key.removesuffix(".weight") not in planned}
    assert tiny.same({k: weights[k] for k in dense}, {k: tiny.snapshot(model)[k] for k in dense})


def test_the_same_seed_gives_the_same_allocation():
    rows = [compress(tiny.build("llama"), global_settings(sparsity=0.5)).sparselr_report for _ in range(2)]
    assert rows[0].allocation == rows[1].allocation
    assert [row["rank"] for row in rows[0].layers] == [row["rank"] for row in rows[1].layers]


def test_nothing_is_left_changed_when_an_allocation_fails():
    model = tiny.build("llama").train()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = math.inf
    weights = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"^model\.layers\.1: the outputs .* NaN or Inf"):
        compress(model, global_settings(sparsity=0.5))
    assert tiny.same(weights, tiny.snapshot(model)) and all(module.training for module in model.modules())


# -- report and config.json


def test_reports_say_what_was_chosen(tmp_path):
    model = compress(tiny.build("llama"), global_settings(sparsity=0.5), output_dir=tmp_path)
    report = Report.load(tmp_path)
    assert report.allocation == model.sparselr_report.allocation
    line = str(report).splitlines()[-1]
    assert line == report.allocation_line() and line.startswith("global: ")
    assert f"{report.allocation['parameters']['uniform']:,} if uniform" in line
    assert f"| Allocation | {line} |" in (tmp_path / "README.md").read_text()
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["sparsity"], stored["rank"], stored["allocation"]) == (0.5, 4, "global")
    assert stored["allocation_options"]["iterations"] == QUICK["iterations"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocation": "owl"}, "allocation='owl' chooses each block's sparsity, which sparsity='2:4' fixes"),
        (
            {"allocation": "owl", "sparsity": None, "method": "svd", "method_options": None},
            "which sparsity=None fixes",
        ),
        ({"allocation": "global", "rank": 0}, "nothing to choose with sparsity='2:4' and rank=0"),
        ({"allocation": "even"}, "allocation='even': expected one of 'uniform', 'owl', 'global'"),
        (
            {"allocation": "owl", "sparsity": 0.95},
            r"allocation_options.spread=0.08: at a sparsity of 0.95, block sparsities would leave \[0, 1\)",
        ),
        (
            {"allocation": "global", "allocation_options": {"rank_floor": 1.5}},
            r"allocation_options.rank_floor=1.5: expected a number in \[0, 1\]",
        ),
        ({"allocation": "global", "allocation_options": {"rank_ceiling": 0.5}}, "rank_ceiling=0.5: expected"),
        ({"allocation": "owl", "sparsity": 0.5, "allocation_options": {"spread": 0}}, "spread=0: expected"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.settings(**changes)


@pytest.mark.parametrize("options", [{"spread": 0.05}, OwlOptions(spread=0.05)])
def test_options_take_both_forms(options):
    config = tiny.settings(sparsity=0.5, allocation="owl", allocation_options=options)
    assert config.allocation_options == OwlOptions(spread=0.05) == config.stored().allocation_options
    with pytest.raises(TypeError, match=r"allocation_options=.*expected a dict or .*GlobalOptions"):
        tiny.settings(allocation="global", allocation_options=OwlOptions())
