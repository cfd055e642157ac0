"""Merging adapters into the factors of compressed layers, and cutting the result back to a rank."""

import copy

import pytest
import torch
from helpers import tiny
from helpers.peft_models import (
    IDS,
    additive,
    all_equal,
    base_tensors,
    compressed_model,
    dense_weights,
    disturb,
    layers_of,
    logits,
    lora_layers,
    sparse_parts,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import hf_sparselr
from hf_sparselr import SparseLRLinear, compress
from hf_sparselr.integrations.peft.merging import truncate


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: layer.rank for name, layer in layers_of(model, SparseLRLinear).items()}


def random_additive(seed: int = 1, **arguments) -> PeftModel:
    adapted = get_peft_model(compressed_model(), additive(init_lora_weights=False, **arguments))
    disturb(adapted, seed=seed)
    return adapted.eval()


# --- exact merging


def test_merging_a_replacing_adapter(reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    before = base_tensors(adapted)
    disturb(adapted)
    expected = logits(adapted)
    adapted.merge_adapter(safe_merge=True)
    assert torch.equal(logits(adapted), expected)
    adapted.unmerge_adapter()
    assert all_equal(base_tensors(adapted), before)
    assert torch.equal(logits(adapted), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), reference)
    merged = adapted.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert all_equal(sparse_parts(merged), sparse_parts(compressed_model()))
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert isinstance(merged.model.layers[0].mlp.up_proj, SparseLRLinear)
    assert not merged.model.layers[0].mlp.up_proj.A.requires_grad


def test_merging_an_additive_adapter_concatenates(reference):
    adapted = random_additive()
    before = base_tensors(adapted)
    expected = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), expected)
    with adapted.disable_adapter():  # also unmerges
        assert torch.equal(logits(adapted), reference)
    assert all_equal(base_tensors(adapted), before)
    with dense_weights() as built:
        merged = adapted.merge_and_unload()
    assert not built
    torch.testing.assert_close(logits(merged), expected)
    assert all_equal(sparse_parts(merged), sparse_parts(compressed_model()))
    found = ranks(merged)
    assert found["layers.1.self_attn.q_proj"] == 3
    assert found["layers.1.mlp.down_proj"] == 9
    assert found["layers.1.mlp.up_proj"] == 4


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("calls", [[["default", "more"]], [["default"], ["more"]], [["more"], ["default"]]])
def test_merging_both_kinds_in_any_order(calls, reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    adapted.add_adapter("more", additive(init_lora_weights=False))
    disturb(adapted)
    adapted.base_model.set_adapter(["more", "default"])
    expected = logits(adapted)
    for names in calls:
        adapted.merge_adapter(names)
    torch.testing.assert_close(logits(adapted), expected)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted.unload()), reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_half_precision(dtype):
    adapted = hf_sparselr.as_peft_model(compressed_model(dtype)).eval()
    disturb(adapted)
    expected = logits(adapted)
    assert torch.equal(logits(adapted.merge_and_unload()), expected)


def test_unmerging_after_a_cast_and_a_copy(reference):
    adapted = random_additive()
    adapted.merge_adapter()
    clone = copy.deepcopy(adapted)
    clone.unmerge_adapter()
    with clone.disable_adapter():
        assert torch.equal(logits(clone), reference)
    adapted.to(torch.bfloat16).unmerge_adapter()
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(compressed_model(torch.bfloat16)))


def test_unload_gives_the_compressed_model_back(reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    disturb(adapted)
    restored = adapted.unload()
    assert not lora_layers(restored)
    assert all_equal(base_tensors(restored), base_tensors(compressed_model()))
    assert torch.equal(logits(restored), reference)


def test_safe_merge_refuses_what_is_not_finite(reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    layer = lora_layers(adapted)["layers.0.self_attn.q_proj"]
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        adapted.merge_adapter(safe_merge=True)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), reference)


def test_lora_bias_is_merged_into_the_bias():
    config = additive(target_modules=["up_proj"], lora_bias=True, init_lora_weights=False)
    adapted = get_peft_model(compressed_model(bias=True), config).eval()
    disturb(adapted)
    expected = logits(adapted)
    torch.testing.assert_close(logits(copy.deepcopy(adapted).merge_and_unload()), expected)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), expected)
    with pytest.warns(match="merging LoRA weights won't be possible"):
        without = get_peft_model(compressed_model(), config)
    with pytest.raises(ValueError, match="layer without bias"):
        without.merge_adapter()


# --- weighting of replacing adapters


def two_replacing() -> PeftModel:
    model = compressed_model()
    adapted = hf_sparselr.as_peft_model(model).eval()
    adapted.add_adapter("second", hf_sparselr.lora_config(model))
    disturb(adapted, "default", 1)
    disturb(adapted, "second", 2)
    return adapted


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_weighted_replacing_adapters_are_the_weighted_sum_of_the_products(kind):
    adapted = two_replacing()
    options = {"svd_rank": 12} if kind == "svd" else {}
    adapted.base_model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum", kind, **options)
    for name, layer in lora_layers(adapted).items():
        one, two, total = (layer.get_delta_weight(a) for a in ("default", "second", "sum"))
        torch.testing.assert_close(total, 0.7 * one + 0.3 * two, atol=1e-5, rtol=1e-5), name
    adapted.set_adapter("sum")
    expected = logits(adapted)
    assert lora_layers(adapted)["layers.0.mlp.up_proj"].replacing["sum"]
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected)


def test_weightings_that_would_distort_replacing_adapters():
    adapted = two_replacing()
    adapted.add_adapter("more", additive())
    weigh = adapted.base_model.add_weighted_adapter
    with pytest.raises(ValueError, match="cannot mix default, more"):
        weigh(["default", "more"], [1, 1], "sum", combination_type="cat")
    with pytest.raises(ValueError, match="must sum to 1"):
        weigh(["default", "second"], [1, 1], "sum", combination_type="cat")
    for kind in ("linear", "ties", "ties_svd", "dare_linear", "magnitude_prune"):
        with pytest.raises(ValueError, match=f"'{kind}' averages or prunes.*use 'svd' or 'cat'"):
            weigh(["default", "second"], [0.5, 0.5], "sum", kind, density=0.5)
    adapted.add_adapter("fewer", hf_sparselr.lora_config(adapted, exclude_modules=["down_proj"]))
    for kind in ("svd", "cat"):
        with pytest.raises(ValueError, match=r"fewer has no factors for .*layers\.0\.mlp\.down_proj"):
            weigh(["default", "fewer"], [0.5, 0.5], "sum", combination_type=kind)
    assert "sum" not in adapted.peft_config


def test_two_replacing_adapters_at_once_are_refused():
    adapted = two_replacing()
    adapted.base_model.set_adapter(["default", "second"])
    for use in (lambda: logits(adapted), adapted.merge_adapter):
        with pytest.raises(ValueError, match="default, second each replace"):
            use()


# --- cutting back to a rank


def random_factors(out: int, inputs: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, inputs, generator=g), torch.randn(out, rank, generator=g)
    X = torch.randn(50, inputs, generator=g) * torch.logspace(0, 2, inputs)
    return A.double(), B.double(), X.double()


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_truncation_reaches_the_least_possible_error(rank, weighted):
    A, B, X = random_factors(7, 9, 6)
    root = X if weighted else torch.eye(9).double()
    small_A, small_B = truncate(A, B, rank, (A @ X.T) @ (A @ X.T).T if weighted else None)
    assert small_A.shape == (rank, 9) and small_B.shape == (7, rank)
    error = (B @ A - small_B @ small_A) @ root.T
    least = torch.linalg.svdvals(B @ A @ root.T)[rank:]  # Eckart-Young
    torch.testing.assert_close(error.norm(), least.norm(), atol=1e-8, rtol=1e-8)


def test_truncation_of_factors_without_full_rank():
    A, B, _ = random_factors(7, 9, 2)
    wide_A, wide_B = torch.cat([A, A, torch.zeros(1, 9)]), torch.cat([B, -B / 2, torch.ones(7, 1)], 1)
    small_A, small_B = truncate(wide_A, wide_B, 4)
    torch.testing.assert_close(small_B @ small_A, B @ A / 2)
    assert small_A.isfinite().all() and small_B.isfinite().all()
    torch.testing.assert_close(small_A.norm(dim=1), small_B.norm(dim=0))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("rank", ["own", 5, 2])
def test_merging_within_a_budget(rank, calibrated):
    adapted = random_additive(target_modules="all-linear")
    exact = copy.deepcopy(adapted).merge_and_unload()
    own = ranks(compressed_model())
    with dense_weights() as built:
        merged = hf_sparselr.merge_and_unload(adapted, rank, calibration=IDS if calibrated else None)
    assert not built
    assert ranks(merged) == {n: min(own[n] + 3, own[n] if rank == "own" else rank) for n in own}
    assert all_equal(sparse_parts(merged), sparse_parts(compressed_model()))
    assert not any(parameter.requires_grad for parameter in merged.model.layers[0].parameters())
    first = "layers.0.self_attn.q_proj"  # of both models, it sees the same inputs
    x = exact.model.layers[0].input_layernorm(exact.model.embed_tokens(IDS)).reshape(-1, 64)
    root = x if calibrated else torch.eye(64)
    full, cut = (layers_of(model, SparseLRLinear)[first] for model in (exact, merged))
    error = (full.B @ full.A - cut.B @ cut.A) @ root.T
    least = torch.linalg.svdvals(full.B @ full.A @ root.T)[cut.rank :]
    torch.testing.assert_close(error.norm(), least.norm(), atol=1e-3, rtol=1e-3)


def test_calibration_lowers_the_change_of_the_outputs():
    adapted = random_additive(target_modules="all-linear", r=6)
    expected = logits(adapted)
    errors = []
    for calibration in (None, IDS, [IDS[0].tolist(), {"input_ids": IDS[1:]}]):
        merged = hf_sparselr.merge_and_unload(copy.deepcopy(adapted), 6, calibration)
        errors.append((logits(merged) - expected).norm().item())
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] == pytest.approx(errors[1], rel=1e-3)


def test_merging_without_a_budget_is_exact():
    adapted = random_additive()
    expected = logits(adapted)
    merged = hf_sparselr.merge_and_unload(copy.deepcopy(adapted))
    torch.testing.assert_close(logits(merged), expected)
    adapted.merge_adapter()
    cut = hf_sparselr.merge_and_unload(adapted, "own")
    assert ranks(cut) == ranks(compressed_model())


def test_bad_arguments():
    adapted = random_additive()
    expected = logits(adapted)
    for arguments, kind, problem in [
        ({"rank": -1}, ValueError, "rank=-1"),
        ({"rank": "most"}, TypeError, "rank='most'"),
        ({"rank": 2.0}, TypeError, r"rank=2\.0"),
        ({"calibration": IDS}, ValueError, "calibration is for cutting back"),
        ({"rank": 2, "calibration": "text"}, TypeError, "calibration='text'"),
        ({"rank": 2, "calibration": []}, ValueError, "calibration is empty"),
        ({"rank": 2, "calibration": [torch.rand(2, 3)]}, ValueError, "calibration item 0"),
    ]:
        with pytest.raises(kind, match=problem):
            hf_sparselr.merge_and_unload(adapted, **arguments)
        assert torch.equal(logits(adapted), expected)
    with pytest.raises(TypeError, match="LlamaForCausalLM: expected a PeftModel"):
        hf_sparselr.merge_and_unload(compressed_model())
    with pytest.raises(ValueError, match="no compressed layer"):
        hf_sparselr.merge_and_unload(get_peft_model(compressed_model(), LoraConfig(target_modules=["lm_head"])))


# --- the merged model is a compressed model


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("rank", [None, 5, 0])
def test_merged_models_save_and_reload_packed(name, rank, tmp_path):
    model = compress(tiny.build(name), tiny.settings())
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=3, init_lora_weights=False)).eval()
    merged = hf_sparselr.merge_and_unload(adapted, rank, tiny.IDS if rank else None)
    expected = tiny.logits(merged)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(loaded), expected)
    assert {layer.rank for layer in layers_of(loaded, SparseLRLinear).values()} == {7 if rank is None else rank}
    assert tiny.same(tiny.snapshot(loaded), tiny.snapshot(merged))


def test_merged_ranks_may_differ_from_layer_to_layer(tmp_path):
    model = compress(tiny.build("llama"), tiny.settings())
    config = LoraConfig(target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, init_lora_weights=False)
    merged = get_peft_model(model, config).eval().merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(merged))
    assert {layer.rank for layer in layers_of(loaded, SparseLRLinear).values()} == {4, 6, 12}
    again = hf_sparselr.as_peft_model(loaded)
    assert torch.equal(tiny.logits(again), tiny.logits(merged))
