"""Distillation: the whole packed model against the dense one's logits."""

import copy
import importlib.util
import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import tiny
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
)

from hf_sparselr import compress
from hf_sparselr.compression import distillation as module
from hf_sparselr.compression import run as offline
from hf_sparselr.compression import samples as samples_module
from hf_sparselr.compression.distillation import copy_sharing_blocks, distill
from hf_sparselr.compression.masters import on_device, unpack_masters
from hf_sparselr.compression.model_structure import find_blocks
from hf_sparselr.compression.plan import plan_layers
from hf_sparselr.compression.samples import Samples
from hf_sparselr.config.options import DistillOptions
from hf_sparselr.data.model_inputs import make_batches, token_samples
from hf_sparselr.data.origin import Origin
from hf_sparselr.data.self_generation import sample_from_model
from hf_sparselr.entrypoints.perplexity import perplexity
from hf_sparselr.nn.linear import packed_layers

CPU = torch.device("cpu")
FAST = {"passes": 3, "batch_size": 2, "lr": 1e-3, "precision": "fp32", "self_samples": 0}
PAYLOAD = ("mask", "values", "A", "B", "bias")


@torch.no_grad()
def dense(name: str = "llama", dtype: torch.dtype = torch.float32):
    """A tiny model with weights large enough for its predictions to differ from one another."""
    model = tiny.build(name, dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(6)
    return model


@cache
def _packed(name: str, dtype: torch.dtype, rank: int):
    return compress(dense(name, dtype), tiny.settings(rank=rank))


def packed(name: str = "llama", dtype: torch.dtype = torch.float32, rank: int = 4):
    """A packed model of its own, and the dense one that it was made from."""
    return copy.deepcopy(_packed(name, dtype, rank)), dense(name, dtype)


def run(model, teacher, batch: int = 2, seed: int = 0, windows=tiny.IDS, **changes) -> dict:
    options = DistillOptions(**{**FAST, **changes})
    with on_device(teacher, CPU, options):
        return distill(model, teacher, make_batches(token_samples(windows), batch), options, seed, CPU)


def divergence(model, teacher, ids: torch.Tensor = tiny.IDS) -> float:
    """KL(teacher || model) in nats a token, of FP32 copies."""
    found = []
    for each in (copy.deepcopy(model), copy.deepcopy(teacher)):
        for tensor in (*each.parameters(), *each.buffers()):
            tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
        found.append(tiny.logits(each, ids).double().log_softmax(-1))
    return float((found[1].exp() * (found[1] - found[0])).sum(-1).mean())


def supports(model) -> dict[str, torch.Tensor]:
    return {name: layer.mask.clone() for name, layer in packed_layers(model).items()}


def places(model) -> dict[str, tuple]:
    return {name: (t.dtype, t.device, t.shape, t.requires_grad) for name, t in model.named_parameters()}


# What it does


@pytest.mark.parametrize("train", ["all", "factors"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "dtype", "rank"),
    [
        ("llama", torch.float32, 4),
        ("llama", torch.bfloat16, 4),
        ("llama-tied", torch.bfloat16, 0),
        ("gpt2", torch.float16, 4),
        ("opt", torch.bfloat16, 4),
        ("t5", torch.float32, 4),
        ("bert-mlm", torch.float32, 4),
    ],
)
def test_lowers_the_divergence_and_keeps_what_is_fixed(name, dtype, rank, precision, train) -> None:
    model, teacher = packed(name, dtype, rank)
    before, own, masks, where = tiny.snapshot(model), tiny.snapshot(teacher), supports(model), places(model)
    stats = run(model, teacher, train=train, precision=precision)
    assert stats["loss_after"] < stats["loss_before"]
    assert stats["loss_after"] == pytest.approx(divergence(model, teacher), rel=0.25 if precision == "bf16" else 1e-3)
    assert stats["passes"] == len(stats["losses"]) == 3
    after = tiny.snapshot(model)
    assert places(model) == where and tiny.same(tiny.snapshot(teacher), own)
    assert all(torch.equal(mask, masks[name]) for name, mask in supports(model).items())
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    allowed = {f"{layer}.{part}" for layer in packed_layers(model) for part in PAYLOAD[1:]}
    allowed |= {key for key, tensor in after.items() if tensor.ndim == 1}
    assert moved <= allowed
    kinds = {key.rpartition(".")[2] for key in moved}
    assert (("values" in kinds) == (train == "all") and {"A", "B"} <= kinds) or rank == 0


@pytest.mark.parametrize("train", ["all", "factors"])
def test_gradients_are_those_of_the_divergence(train) -> None:
    model, teacher = packed()
    options = DistillOptions(**{**FAST, "train": train})
    layers = packed_layers(model)
    groups = unpack_masters(model, layers, CPU, options)
    parameters = [parameter.requires_grad_() for group in groups.values() for parameter in group]
    loss = module.add_gradients(model, teacher, {"input_ids": tiny.IDS}, tiny.IDS.numel(), options)
    found = [parameter.grad.clone() for parameter in parameters]
    mine = model(input_ids=tiny.IDS).logits.log_softmax(-1)
    with torch.no_grad():
        theirs = teacher(input_ids=tiny.IDS).logits.log_softmax(-1)
    exact = (theirs.exp() * (theirs - mine)).sum() / tiny.IDS.numel()
    assert float(loss) == pytest.approx(float(exact.detach()), rel=1e-4)
    for gradient, expected in zip(found, torch.autograd.grad(exact, parameters), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_the_second_term_is_the_distance_of_the_blocks_outputs(padded) -> None:
    model, teacher = packed()
    options = DistillOptions(**{**FAST, "hidden_weight": 2.0})
    pairs = module.block_pairs(model, teacher)
    groups = unpack_masters(model, packed_layers(model), CPU, options)
    parameters = [parameter.requires_grad_() for group in groups.values() for parameter in group]
    batch, real = {"input_ids": tiny.IDS}, torch.ones_like(tiny.IDS, dtype=torch.bool)
    if padded:
        real[:, 20:] = False
        batch["attention_mask"] = real.long()
    module.add_gradients(model, teacher, batch, int(real.sum()), options, pairs)
    found = [parameter.grad.clone() for parameter in parameters]
    outputs = {}
    for kind, each in (("mine", model), ("theirs", teacher)):
        for index, block in enumerate(each.model.layers):
            block.register_forward_hook(lambda _, args, out, key=(kind, index): outputs.__setitem__(key, out))
    mine, theirs = (each(**batch).logits.log_softmax(-1)[real] for each in (model, teacher))
    exact = (theirs.exp() * (theirs - mine)).sum(-1).mean()
    blocks = len(model.model.layers)
    for index in range(blocks):
        x, y = (outputs[kind, index][real].double() for kind in ("mine", "theirs"))
        exact = exact + 2.0 / blocks * ((x - y).square().sum(-1) / y.square().sum(-1)).mean()
    assert len(pairs) == blocks == 2
    for gradient, expected in zip(found, torch.autograd.grad(exact, parameters), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_blocks_that_are_not_called_do_not_count() -> None:
    model, teacher = packed()
    options = DistillOptions(**{**FAST, "hidden_weight": 2.0})
    pairs = module.block_pairs(model, teacher)
    groups = unpack_masters(model, packed_layers(model), CPU, options)
    parameters = [parameter.requires_grad_() for group in groups.values() for parameter in group]
    found = []
    for each in (pairs, [*pairs, (nn.Identity(), nn.Identity())]):
        module.add_gradients(model, teacher, {"input_ids": tiny.IDS}, tiny.IDS.numel(), options, each)
        found.append([parameter.grad.clone() for parameter in parameters])
        model.zero_grad()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("train", ["all", "factors"])
def test_loss_before_is_that_of_the_packed_model(train) -> None:
    model, teacher = packed("llama", torch.bfloat16)
    expected = divergence(model, teacher)
    stats = run(model, teacher, train=train, passes=1, lr=1e-9)
    assert stats["loss_before"] == pytest.approx(expected, rel=1e-3)
    assert stats["losses"][0] == pytest.approx(expected, rel=1e-3)


def test_a_trained_model_predicts_better_afterwards() -> None:
    """On a file that neither calibration nor the model's own training saw."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.PYLM)
    files = [importlib.util.find_spec(name).origin for name in ("textwrap", "ast", "inspect", "typing")]
    held_out, *texts = [Path(file).read_text(encoding="utf-8") for file in files]
    ids = torch.tensor(tokenizer(held_out, verbose=False)["input_ids"])[:1536].view(12, 128)
    config = tiny.settings(
        sparsity=0.6,
        rank=8,
        calibration=texts,
        tokenizer=tokenizer,
        num_samples=24,
        seq_len=64,
        method_options={"min_iterations": 10, "max_iterations": 10, "refit_rounds": 0},
        distill={**FAST, "passes": 2, "lr": 1e-3, "batch_size": 4, "self_samples": 8, "self_len": 48},
    )
    teacher = AutoModelForCausalLM.from_pretrained(tiny.PYLM, dtype=torch.float32)
    model = compress(copy.deepcopy(teacher), config)
    before, report = perplexity(model, ids), model.sparselr_report
    samples = Samples.load(teacher, config, Origin(""))
    offline.distill_in_memory(model, teacher, samples.loaded, samples, report)
    assert report.distill["loss_after"] < 0.85 * report.distill["loss_before"]
    assert perplexity(model, ids) < 0.6 * before


def test_relative_steps_fall_with_the_square_root_of_the_blocks() -> None:
    moved = {}
    for blocks in (2, 24):
        teacher = tiny.build("llama", num_hidden_layers=blocks)
        settings = tiny.settings(rank=0, method="wanda", method_options=None)
        model = compress(tiny.build("llama", num_hidden_layers=blocks), settings)
        layers = packed_layers(model)
        before = {name: layer.values.clone() for name, layer in layers.items()}
        run(model, teacher, batch=4, batch_size=4, passes=1, lr=1e-4, final_lr=1.0)
        moved[blocks] = [(layer.values - before[name]).abs().median() for name, layer in layers.items()]
    share = torch.stack(moved[24][:14]) / torch.stack(moved[2])  # Adam's first step is the step size
    assert share.median() == pytest.approx((6 / 24) ** 0.5, rel=0.05)


def test_deterministic_for_a_seed() -> None:
    found = []
    for seed, other in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(other)
        model, teacher = packed()
        stats = run(model, teacher, seed=seed)
        found.append((tiny.snapshot(model), stats["losses"]))
    assert tiny.same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not tiny.same(found[0][0], found[2][0])


@pytest.mark.parametrize("train", ["all", "factors"])
def test_micro_batches_make_the_same_steps(train) -> None:
    found = []
    for batch in (4, 2, 1):
        model, teacher = packed()
        found.append((run(model, teacher, batch, batch_size=4, train=train), tiny.snapshot(model)))
    for stats, state in found[1:]:
        assert stats["losses"] == pytest.approx(found[0][0]["losses"], rel=1e-3)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, found[0][1][name], rtol=0, atol=0.1 * FAST["lr"])
    assert not tiny.same(found[0][1], tiny.snapshot(packed()[0]))


def test_windows_of_different_lengths() -> None:
    model, teacher = packed()
    windows = [tiny.IDS[0], tiny.IDS[1, :20], tiny.IDS[2, :20], tiny.IDS[3, :7]]
    stats = run(model, teacher, windows=windows)
    assert stats["loss_after"] < stats["loss_before"]


@pytest.mark.parametrize("train", ["all", "factors"])
@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_checkpointing_computes_blocks_again_and_changes_nothing(name, train) -> None:
    found, calls = [], []
    for wanted in (False, True):
        model, teacher = packed(name)
        block = next(iter(find_blocks(model).values()))
        inner = next(part for key, part in block.named_modules() if "norm" in key)
        count = []
        inner.register_forward_pre_hook(lambda *_, count=count: count.append(torch.is_grad_enabled()))
        stats = run(model, teacher, checkpointing=wanted, train=train, passes=1)
        found.append((stats["losses"], {n: t for n, t in tiny.snapshot(model).items()}))
        calls.append(count)
        assert "forward" not in vars(block)
    assert found[0][0] == found[1][0] and tiny.same(found[0][1], found[1][1])
    steps = len(tiny.IDS) // 2
    weighed = 3 if stats["best_pass"] else 2  # the start, after the pass, and rounded where that was better
    assert [len(count) for count in calls] == [weighed * steps + steps, weighed * steps + 2 * steps]


# What it leaves alone


@pytest.mark.parametrize("lr", [1e6, 30.0])
@pytest.mark.parametrize("train", ["all", "factors"])
def test_a_hopeless_run_leaves_the_model(train, lr) -> None:
    model, teacher = packed("llama", torch.bfloat16)
    before = tiny.snapshot(model)
    stats = run(model, teacher, train=train, lr=lr)
    assert stats["loss_after"] == stats["loss_before"] > 0
    assert tiny.same(tiny.snapshot(model), before)
    json.dumps(stats, allow_nan=False)


@pytest.mark.parametrize("train", ["all", "factors"])
def test_ties_modules_flags_and_user_gradients_stay(train) -> None:
    model, teacher = packed("llama-tied", torch.bfloat16)
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    teacher.requires_grad_(False).train()
    teacher.lm_head.weight.requires_grad_(True)
    modules = {name: (id(part), part.training) for name, part in model.named_modules()}
    tensors = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    where, theirs = places(model), places(teacher)
    with torch.no_grad():
        run(model, teacher, train=train, checkpointing=True)
        assert not torch.is_grad_enabled()
    assert {name: (id(part), part.training) for name, part in model.named_modules()} == modules
    assert [id(tensor) for tensor in model.state_dict(keep_vars=True).values()] == tensors
    assert places(model) == where and places(teacher) == theirs
    assert all(part.training for part in teacher.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.grad is None for parameter in model.parameters())


def failing_on_pass(monkeypatch) -> None:
    def raising(*args):
        real(*args[:6], lambda loss: 1 / 0, *args[7:])

    real = offline.distill
    monkeypatch.setattr(offline, "distill", raising)


def failing_step(monkeypatch) -> None:
    calls, real = [], module.add_gradients

    def raising(*args):
        calls.append(real(*args))
        return calls[-1] if len(calls) < 4 else 1 / 0

    monkeypatch.setattr(module, "add_gradients", raising)


def failing_sample(monkeypatch) -> None:
    monkeypatch.setattr(samples_module, "sample_from_model", lambda *args, **kwargs: 1 / 0)


@pytest.mark.parametrize("train", ["all", "factors"])
@pytest.mark.parametrize("spoil", [failing_on_pass, failing_step, failing_sample])
def test_a_run_that_fails_leaves_the_users_model(spoil, train, monkeypatch) -> None:
    spoil(monkeypatch)
    model = dense("llama-tied", torch.bfloat16).train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    bits, where = tiny.snapshot(model), places(model)
    modules = [(name, id(part), part.training, *vars(part)) for name, part in model.named_modules()]
    settings = tiny.settings(refine="tm+distill", distill={**FAST, "train": train, "self_samples": 2})
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError) as caught:
            compress(model, settings)
        assert caught.traceback and not torch.is_grad_enabled()  # its frames are still alive
    assert [(name, id(part), part.training, *vars(part)) for name, part in model.named_modules()] == modules
    assert places(model) == where and tiny.same(tiny.snapshot(model), bits)
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.undo()
    compress(model, settings)


def test_shadow_shares_the_blocks_alone() -> None:
    model = dense("llama-tied")
    copied = copy_sharing_blocks(model, find_blocks(model))
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight is not model.lm_head.weight
    for (name, mine), (_, theirs) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        assert (mine is theirs) == ("layers" in name)
    copied.model.layers[0] = nn.Identity()
    assert not isinstance(model.model.layers[0], nn.Identity)


# Inside compress


@pytest.mark.parametrize("refine", ["distill", "tm+distill"])
def test_compress_distils_from_the_dense_model(refine, tmp_path) -> None:
    config = tiny.settings(refine=refine, distill=FAST, tm={"passes": 1})
    without = tiny.settings(refine=None if refine == "distill" else "tm", tm=config.tm)
    plain = compress(dense("llama", torch.bfloat16), without)
    model = compress(dense("llama", torch.bfloat16), config, tmp_path)
    stats, teacher = model.sparselr_report.distill, dense("llama", torch.bfloat16)
    assert stats["loss_before"] == pytest.approx(divergence(plain, teacher), rel=1e-3)
    assert stats["loss_after"] == pytest.approx(divergence(model, teacher), rel=1e-3)
    assert stats["loss_after"] < stats["loss_before"]
    assert plain.sparselr_report.distill is None
    assert (model.sparselr_report.blocks[0]["tm"] is None) == (refine == "distill")
    assert all(torch.equal(mask, supports(plain)[name]) for name, mask in supports(model).items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert loaded.sparselr_report.distill == stats
    assert loaded.config.quantization_config.distill == config.distill


@pytest.mark.parametrize("train", ["all", "factors"])
def test_a_cpu_without_bf16_computes_in_fp32(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", {torch.bfloat16})
    one, other = (
        tiny.snapshot(
            compress(
                dense("llama", torch.bfloat16),
                tiny.settings(
                    refine="tm+distill",
                    tm={"passes": 1, "precision": precision},
                    distill={**FAST, "passes": 1, "train": train, "precision": precision},
                ),
            )
        )
        for precision in ("fp32", "bf16")
    )
    assert tiny.same(one, other)


def test_the_dense_model_writes_windows_of_its_own(monkeypatch) -> None:
    seen, real = [], offline.distill
    monkeypatch.setattr(offline, "distill", lambda *args: seen.extend(args[2]) or real(*args))
    own = {**FAST, "self_samples": 3, "self_len": 10, "prompted": 0.0}
    model = compress(dense(), tiny.settings(refine="distill", distill=own, seed=4))
    written = sample_from_model(dense(), None, num_samples=3, seq_len=10, seed=5)
    windows = [row for batch in seen for row in batch["input_ids"]]
    assert [len(row) for row in windows] == [32] * 4 + [10] * 3
    assert torch.equal(torch.stack(windows[:4]), tiny.IDS)
    assert torch.equal(torch.stack(windows[4:]), torch.stack(written))
    stats = model.sparselr_report.distill
    assert stats["loss_after"] < stats["loss_before"]


def test_noisy_copies_of_both_kinds_are_trained_on(monkeypatch) -> None:
    seen, real = [], offline.distill
    monkeypatch.setattr(offline, "distill", lambda *args: seen.extend([args[2], args[7]]) or real(*args))
    own = {**FAST, "self_samples": 8, "self_len": 32}
    compress(dense(), tiny.settings(refine="distill", distill=own, noisy_windows=0.5, seed=4))
    parts = (seen[0], [batch for own in seen[1].values() for batch in own])
    trained, kept_back = ([row for batch in part for row in batch["input_ids"]] for part in parts)
    copies = [(one != other).float().mean() for one, other in pairwise(trained)]
    noisy = [share for share in copies if 0 < share < 0.6]
    assert len(trained) == 4 + 2 + 7 + 3 and len(noisy) == 2 + 3  # one of the 8 is kept back
    assert len(kept_back) == 1


def test_a_share_of_its_windows_continue_calibration_windows(monkeypatch) -> None:
    seen, real = [], offline.distill
    monkeypatch.setattr(offline, "distill", lambda *args: seen.extend(args[2]) or real(*args))
    own = {**FAST, "self_samples": 6, "self_len": 12, "prompted": 0.5}
    compress(dense(), tiny.settings(refine="distill", distill=own))
    windows = [row for batch in seen for row in batch["input_ids"]][4:]
    places = {tuple(place.tolist()) for row in tiny.IDS for place in row.unfold(0, 6, 1)}
    assert [tuple(row[:6].tolist()) in places for row in windows] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("scale", "share"), [(300, 1.0), (1, 0.5)])
def test_all_windows_continue_calibration_text_where_others_repeat_each_other(scale: float, share: float) -> None:
    teacher = dense()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(scale)  # sure of its next token, it writes nearly the same after one first token
    config = tiny.settings(refine="distill", distill={**FAST, "self_samples": 16, "self_len": 24}, seed=3)
    samples = Samples(config, Origin(""), token_samples(list(tiny.IDS)))
    windows, found = samples.for_distillation(teacher, samples.loaded)
    assert found["prompted"] == share and len(windows) == 16
    assert (found["alike"]["plain"] > found["alike"]["prompted"] + 0.1) == (share == 1)
    places = {tuple(place.tolist()) for row in tiny.IDS for place in row.unfold(0, 12, 1)}
    starts = [tuple(window["input_ids"][0, :12].tolist()) for window in windows]
    assert [start in places for start in starts] == [True] * round(16 * share) + [False] * round(16 * (1 - share))
    assert len(set(starts)) > 12 * share


@pytest.mark.parametrize(
    ("count", "width", "size"), [(2048, 576, 2048), (3, 64, 3), (2048, 4096, 293), (80, 2**20, 80)]
)
def test_windows_are_written_in_few_equal_parts(count: int, width: int, size: int) -> None:
    model = nn.Module()
    model.get_input_embeddings = lambda: nn.Embedding(1, width, device="meta")
    assert samples_module._at_a_time(model, count) == size


def test_the_report_says_how_self_written_text_begins() -> None:
    own = {**FAST, "self_samples": 8, "self_len": 16}
    report = compress(dense(), tiny.settings(refine="distill", distill=own)).sparselr_report
    alike = report.distill["self_written"]["alike"]
    assert report.refinement_lines()[-1] == (
        f"self-written text: 50% of the windows continue calibration text; the share of runs of four tokens that stand "
        f"in the text before is {alike['prompted']:.1%} in such windows and {alike['plain']:.1%} in others"
    )
    given = compress(dense(), tiny.settings(refine="distill", distill={**own, "prompted": 0.25})).sparselr_report
    assert given.distill["self_written"] == {"prompted": 0.25, "alike": {}}
    assert len(given.refinement_lines()) == len(report.refinement_lines()) - 1


def test_prompts_are_real_tokens_after_the_first_one() -> None:
    ids, mask = torch.arange(100, 110)[None], torch.ones(1, 10, dtype=torch.int64)
    mask[0, 6:] = 0
    samples = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids + 100}, {"pixel_values": ids}]
    prompts = samples_module._prompts(samples, 8, 5, 200, seed=0)
    assert prompts.shape == (8, 5) and torch.equal(prompts, samples_module._prompts(samples, 8, 5, 200, seed=0))
    assert bool((prompts[::2] <= 105).all())  # the rest of the first sample is padding
    assert bool((prompts[1::2, 0] == 200).all()) and bool((prompts[1::2, 1:] > 200).all())
    assert all(bool((prompt.diff() == 1).all()) for prompt in prompts[:, 1:])
    assert len(samples_module._prompts(samples, 8, 11, 200, seed=0)) == 0
    assert len(samples_module._prompts(samples[2:], 8, 5, 200, seed=0)) == 0


def test_its_windows_fit_into_the_context() -> None:
    own = {**FAST, "self_samples": 2, "self_len": 1000}  # its positions end at 64
    model = compress(dense("opt"), tiny.settings(refine="distill", distill=own))
    assert model.sparselr_report.distill["loss_after"] < model.sparselr_report.distill["loss_before"]


def test_pure_low_rank_works() -> None:
    config = tiny.settings(method="svd", sparsity=None, method_options={}, refine="distill", distill=FAST)
    model = compress(dense(), config)
    stats = model.sparselr_report.distill
    assert stats["loss_after"] < stats["loss_before"]
    assert all(layer.values.numel() == 0 for layer in packed_layers(model).values())


# Errors


@pytest.fixture
def headless(tmp_path):
    """A model without a head, in memory, and a checkpoint of it whose weights cannot be read."""
    model = tiny.build("bert")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    return model, tmp_path


@pytest.mark.parametrize("refine", ["distill", "tm+distill"])
def test_a_model_without_logits_is_refused_first(refine, headless) -> None:
    config = tiny.settings(refine=refine)
    message = rf"^refine='{re.escape(refine)}': BertModel has no logits to distill"
    for model in headless:
        with pytest.raises(ValueError, match=message):
            compress(model, config)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(headless[1], quantization_config=config)
    assert plan_layers(headless[0], tiny.settings(refine="tm"))


@pytest.mark.parametrize(
    ("cls", "found"),
    [
        (BertForQuestionAnswering, r"has no logits to distill \(it returns start_logits, end_logits\)"),
        (BertForPreTraining, r"has no logits to distill \(it returns prediction_logits, "),
        (BertForMultipleChoice, r"cannot be run on a calibration sample \(RuntimeError"),
    ],
)
def test_a_head_whose_output_cannot_be_distilled_is_refused_before_the_work(cls, found, monkeypatch) -> None:
    monkeypatch.setattr(offline, "run", lambda *args: pytest.fail("layers were solved"))
    model = cls(tiny.build("bert").config).eval()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=rf"^refine='distill': {cls.__name__} {found}"):
        compress(model, tiny.settings(refine="distill", distill={"self_samples": 0}))
    assert tiny.same(tiny.snapshot(model), before)


@pytest.mark.parametrize("name", ["t5", "bert-mlm"])
def test_text_of_its_own_needs_a_model_that_writes(name) -> None:
    config = tiny.settings(refine="distill", distill={"self_samples": 2})
    kind = type(tiny.build(name)).__name__
    with pytest.raises(ValueError, match=rf"^distill\.self_samples=2: {kind} is no decoder"):
        compress(tiny.build(name), config)


def test_a_model_on_several_devices_is_refused_first() -> None:
    model = tiny.build("llama")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"^refine='distill': .* spreads it over 0, 1"):
        compress(model, tiny.settings(refine="distill"))


@pytest.mark.parametrize(
    ("field", "value", "kind", "allowed"),
    [
        ("passes", 0, ValueError, "an integer >= 1"),
        ("passes", 1.5, TypeError, "an integer >= 1"),
        ("batch_size", 0, ValueError, "an integer >= 1"),
        ("self_samples", -1, ValueError, "an integer >= 0"),
        ("self_len", 1, ValueError, "an integer >= 2"),
        ("lr", 0, ValueError, "a finite number > 0"),
        ("lr", float("inf"), ValueError, "a finite number > 0"),
        ("factor_lr", -1, ValueError, "a finite number >= 0"),
        ("final_lr", "x", TypeError, "a finite number >= 0"),
        ("train", "S", ValueError, "'all', 'factors'"),
        ("checkpointing", "yes", ValueError, "True, False"),
        ("precision", "fp16", ValueError, "'fp32', 'tf32', 'bf16'"),
    ],
)
def test_options_name_field_value_and_allowed(field: str, value, kind: type, allowed: str) -> None:
    with pytest.raises(kind) as caught:
        DistillOptions(**{field: value})
    assert str(caught.value).startswith(f"distill.{field}={value!r}: expected") and allowed in str(caught.value)
