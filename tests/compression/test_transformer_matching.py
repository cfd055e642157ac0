"""Transformer matching on one block of a tiny Llama."""

import copy
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from helpers.tiny import IDS, build
from torch import nn

from hf_sparselr.compression.capture import capture_block_inputs, replay
from hf_sparselr.compression.model_structure import find_stacks
from hf_sparselr.compression.transformer_matching import match_block, mean_squared_error, resolve_precision
from hf_sparselr.compression.working_linear import WorkingLinear, trainable
from hf_sparselr.config.options import TMOptions
from hf_sparselr.data.model_inputs import make_batches, token_samples
from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.format.patterns import NM
from hf_sparselr.solvers.gram import GramAccumulator, ScaledGram
from hf_sparselr.solvers.registry import METHODS
from hf_sparselr.solvers.threebasil.method import Options

FAST = TMOptions(passes=4, lr=1e-3, batch_size=2)
SOLVER = Options(min_iterations=10, max_iterations=20)
LAYERS = [f"self_attn.{name}_proj" for name in "qkv"]
LAYERS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
DENSE = "self_attn.o_proj"  # stays dense


@cache
def dense_block(batch: int = 2) -> tuple[nn.Module, list, list, list]:
    """The first block, its inputs and calls in batches, and its outputs."""
    model = build("llama")
    blocks = next(iter(find_stacks(model).values()))
    recording = capture_block_inputs(model, blocks, make_batches(token_samples(IDS), batch))
    name, block = next(iter(blocks.items()))
    calls = recording.calls[name]
    with torch.no_grad():
        outputs = [replay(block, x, call) for x, call in zip(recording.inputs, calls, strict=True)]
    return block, recording.inputs, outputs, calls


@cache
def solved(rank: int) -> dict[str, Decomposition]:
    block, inputs, _, calls = dense_block()
    grams = {name: GramAccumulator(block.get_submodule(name).in_features, "cpu") for name in LAYERS}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, gram=gram: gram.add(args[0]))
        for name, gram in grams.items()
    ]
    with torch.no_grad():
        for x, call in zip(inputs, calls, strict=True):
            replay(block, x, call)
    for handle in handles:
        handle.remove()
    solve = METHODS["3basil"].solve
    return {
        name: solve(block.get_submodule(name).weight.detach(), ScaledGram(gram.gram), NM(2, 4), rank, SOLVER)
        for name, gram in grams.items()
    }


def compressed_block(rank: int = 4) -> nn.Module:
    block = copy.deepcopy(dense_block()[0])
    for name, parts in solved(rank).items():
        block.set_submodule(name, WorkingLinear(replace(parts, S=parts.S.clone(), **factors(parts)), None))
    return block


def factors(parts: Decomposition) -> dict:
    return {} if parts.A is None else {"A": parts.A.clone(), "B": parts.B.clone()}


def match(block: nn.Module, options: TMOptions = FAST, seed: int = 0, batch: int = 2, **kwargs) -> dict:
    _, inputs, targets, calls = dense_block(batch)
    return match_block(block, inputs, targets, calls, options, seed, **kwargs)


def state(block: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lowers_the_error_and_keeps_the_zeros(rank: int, precision: str) -> None:
    block = compressed_block(rank)
    before = state(block)
    _, inputs, targets, calls = dense_block()
    stats = match(block, replace(FAST, precision=precision))
    assert stats["loss_after"] < 0.95 * stats["loss_before"]
    batches = list(zip(inputs, targets, calls, strict=True))
    assert stats["loss_after"] == mean_squared_error(block, batches, precision)
    assert stats["passes"] == FAST.passes and 1 <= stats["best_pass"] <= FAST.passes
    for name, parts in solved(rank).items():
        layer = block.get_submodule(name)
        assert torch.equal(layer.mask, parts.mask)
        assert not layer.S[~parts.mask].any()
        assert not torch.equal(layer.S, parts.S)
        assert layer.decomposition().S.dtype == torch.float32
    after = state(block)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} <= moved
    assert f"{DENSE}.weight" not in moved
    if rank:
        assert {"mlp.up_proj.A", "mlp.up_proj.B"} <= moved


@pytest.mark.parametrize(("width", "chosen"), [(2048, "tf32"), (2049, "bf16")])
def test_auto_takes_bf16_for_large_layers(width: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(width, width, device="meta"))

    def resolved(asked: str, device: str) -> str:
        return resolve_precision(TMOptions(precision=asked), block, torch.device(device)).precision

    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", set())
    assert resolved("auto", "cuda") == resolved("auto", "cpu") == chosen
    assert resolved("fp32", "cuda") == "fp32"
    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", {torch.bfloat16})
    assert resolved("auto", "cuda") == chosen and resolved("bf16", "cuda") == "bf16"
    assert resolved("auto", "cpu") == chosen.replace("bf16", "fp32") and resolved("bf16", "cpu") == "fp32"


def test_start_is_measured_before_anything_moves() -> None:
    block = compressed_block()
    _, inputs, targets, calls = dense_block()
    with torch.no_grad():
        outputs = torch.cat([replay(block, x, call) for x, call in zip(inputs, calls, strict=True)])
    expected = float((outputs - torch.cat(targets)).double().square().mean())
    assert match(block)["loss_before"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lr", [10.0, 1e6])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_hopeless_run_leaves_the_start(lr: float, passes: int) -> None:
    block = compressed_block()
    before = state(block)
    stats = match(block, replace(FAST, lr=lr, passes=passes))
    assert stats["loss_after"] == stats["loss_before"] > 0
    assert stats["best_pass"] == 0
    assert same(state(block), before)


def test_keeps_the_best_state_and_stops_when_nothing_helps_any_more() -> None:
    """The step size grows a thousandfold: good at first, then the block falls apart."""
    block, states = compressed_block(), []
    options = replace(FAST, passes=20, lr=2e-4, final_lr=1e3)
    stats = match(block, options, on_pass=lambda _: states.append(state(block)))
    best = stats["best_pass"]
    assert best >= 1 and stats["passes"] <= best + 3 + sum(1 for _ in range(best)) < 20
    assert same(state(block), states[best - 1])
    _, inputs, targets, calls = dense_block()
    left = mean_squared_error(block, list(zip(inputs, targets, calls, strict=True)))
    assert left == pytest.approx(stats["loss_after"], rel=1e-12) and left < stats["loss_before"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_reports_the_loss_of_every_pass_relative_to_the_start(batch_size: int) -> None:
    losses = []
    options = replace(FAST, lr=1e-12, passes=2, batch_size=batch_size)
    stats = match(compressed_block(), options, batch=1, on_pass=losses.append)
    assert losses == stats["train_loss"] == pytest.approx([1.0] * 2, rel=1e-3)
    assert stats["passes"] == len(losses)


@pytest.mark.parametrize("spoil", [False, True])
def test_windows_kept_back_decide(spoil: bool) -> None:
    """The last batch, here a copy of the first, is not trained on. Its targets decide whether training was of use."""
    block = compressed_block()
    before = state(block)
    _, inputs, targets, calls = ([*part, part[0]] if isinstance(part, list) else part for part in dense_block(1))
    batches = list(zip(inputs, targets, calls, strict=True))
    if spoil:  # only the start gives these outputs
        with torch.no_grad():
            targets = [*targets[:-1], replay(block, inputs[-1], calls[-1]) * 1.0001]
    stats = match_block(block, inputs, targets, calls, replace(FAST, lr=3e-4), 0, kept_back=1)
    assert same(state(block), before) == spoil
    assert (stats["best_pass"] == 0) == spoil
    if not spoil:
        left = mean_squared_error(block, batches[-1:])
        assert left == pytest.approx(stats["loss_after"], rel=1e-12) and left < stats["loss_before"]
        assert stats["loss_after"] == pytest.approx(stats["loss_before"] * min(stats["kept_back_loss"]))


def test_windows_kept_back_are_not_trained_on() -> None:
    results, options = [], replace(FAST, passes=1, lr=1e-4)
    _, inputs, targets, calls = ([*part, part[0]] if isinstance(part, list) else part for part in dense_block(1))
    for scale in (1.0, 1.01):
        block = compressed_block()
        own = [*targets[:-1], targets[-1] * scale]
        assert match_block(block, inputs, own, calls, options, 0, kept_back=1)["best_pass"] == 1
        results.append(block.get_submodule("mlp.up_proj").S)
    moved = compressed_block()
    match_block(moved, inputs, own, calls, options, 0)
    assert torch.allclose(*results, atol=1e-6)
    assert not torch.allclose(results[0], moved.get_submodule("mlp.up_proj").S, atol=1e-5)


def test_stops_at_the_first_pass_without_a_finite_loss() -> None:
    assert match(compressed_block(), replace(FAST, lr=1e6))["passes"] < FAST.passes


def test_bf16_only_where_asked() -> None:
    results = []
    for changes in ({}, {"precision": "fp32"}, {"precision": "bf16"}):
        block = compressed_block()
        match(block, TMOptions(passes=2, lr=1e-3, batch_size=2, **changes))
        results.append(state(block))
    assert same(results[0], results[1])
    assert not same(results[1], results[2])


def test_nothing_to_do_for_a_block_without_error() -> None:
    block = copy.deepcopy(dense_block()[0])
    before = state(block)
    stats = match(block)
    assert (stats["loss_before"], stats["loss_after"], stats["passes"], stats["best_pass"]) == (0, 0, 0, 0)
    assert same(state(block), before)


def test_deterministic_for_a_seed() -> None:
    results = []
    for seed, global_seed in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(global_seed)
        block = compressed_block()
        stats = match(block, seed=seed)
        results.append((state(block), stats["loss_after"]))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not same(results[0][0], results[2][0])


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_make_the_same_steps(micro: int) -> None:
    """Adam moves every weight by about lr whatever its gradient's size: rounding shows at that scale."""
    whole, parts = compressed_block(), compressed_block()
    options = replace(FAST, batch_size=4)
    first, second = match(whole, options, batch=4), match(parts, options, batch=micro)
    assert first["loss_before"] == pytest.approx(second["loss_before"], rel=1e-5)
    assert first["loss_after"] == pytest.approx(second["loss_after"], rel=1e-3)
    left, right, start = state(whole), state(parts), state(compressed_block())
    for name in left:
        if left[name].is_floating_point():
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=0.05 * FAST.lr)
    assert (left["mlp.up_proj.S"] - start["mlp.up_proj.S"]).abs().max() > FAST.lr


def test_step_size_decides_what_a_step_is() -> None:
    results = [match(compressed_block(), replace(FAST, batch_size=size), batch=1) for size in (1, 4)]
    assert results[0]["loss_after"] != results[1]["loss_after"]


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 1e6])
def test_restores_flags_and_leaves_no_gradients(flag: bool, lr: float) -> None:
    block = compressed_block().requires_grad_(flag)
    block.input_layernorm.weight.requires_grad_(not flag)
    before = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    match(block, replace(FAST, lr=lr))
    assert {name: parameter.requires_grad for name, parameter in block.named_parameters()} == before
    assert all(parameter.grad is None for parameter in block.parameters())


def test_trains_under_no_grad() -> None:
    with torch.no_grad():
        stats = match(compressed_block())
        assert not torch.is_grad_enabled()
    assert stats["loss_after"] < stats["loss_before"]


def test_trains_decompositions_norms_and_biases_only() -> None:
    block = compressed_block()
    block.get_submodule(DENSE).bias = nn.Parameter(torch.zeros(32))
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    found = [names[id(parameter)] for group in trainable(block).values() for parameter in group]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    expected = {f"{layer}.{part}" for layer in LAYERS for part in "SAB"} | {*norms, f"{DENSE}.bias"}
    assert set(found) == expected and len(found) == len(expected)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_working_linear_computes_its_decomposition(rank: int, bias: bool) -> None:
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    mask = randn(6, 8) > 0
    parts = Decomposition(randn(6, 8) * mask, mask, *((randn(rank, 8), randn(6, rank)) if rank else ()))
    vector = randn(6).bfloat16() if bias else None
    layer = WorkingLinear(parts, vector)
    inputs = randn(2, 5, 8)
    expected = inputs @ parts.dense().T + (vector.float() if bias else 0)
    torch.testing.assert_close(layer(inputs), expected)
    assert torch.equal(layer.weight, parts.dense())
    layer(inputs).square().sum().backward()
    assert not layer.S.grad[~mask].any() and layer.S.grad[mask].all()
    back = layer.decomposition()
    assert torch.equal(back.S, parts.S) and torch.equal(back.mask, mask) and not back.S.requires_grad
    assert back.A is None if not rank else torch.equal(back.B @ back.A, parts.B @ parts.A)


@pytest.mark.parametrize(
    ("field", "value", "kind", "allowed"),
    [
        ("passes", 0, ValueError, "an integer >= 1"),
        ("passes", 1.0, TypeError, "an integer >= 1"),
        ("batch_size", 0, ValueError, "an integer >= 1"),
        ("batch_size", True, TypeError, "an integer >= 1"),
        ("lr", 0, ValueError, "a finite number > 0"),
        ("lr", float("nan"), ValueError, "a finite number > 0"),
        ("lr", "1e-5", TypeError, "a finite number > 0"),
        ("final_lr", -0.1, ValueError, "a finite number >= 0"),
        ("final_lr", float("inf"), ValueError, "a finite number >= 0"),
        ("precision", "fp16", ValueError, "'auto', 'fp32', 'tf32', 'bf16'"),
    ],
)
def test_options_name_field_value_and_allowed(field: str, value, kind: type, allowed: str) -> None:
    with pytest.raises(kind) as caught:
        TMOptions(**{field: value})
    assert str(caught.value).startswith(f"tm.{field}={value!r}: expected") and allowed in str(caught.value)
