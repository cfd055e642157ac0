"""How adapters over a compressed model run: hot-swapped, compiled, checkpointed, in half precision."""

import pytest
import torch
from helpers.peft_models import (
    CLOSE,
    IDS,
    additive,
    compressed_model,
    disturb,
    logits,
    lora_layers,
    random_adapter,
    train,
)
from peft import PeftModel, get_peft_model
from peft.utils import hotswap
from torch import nn

import hf_sparselr

# --- hot swap


def test_hot_swap(tmp_path):
    folders = {r: random_adapter(additive(r=r, lora_alpha=2 * r + 1), tmp_path / str(r), r) for r in (3, 2, 5)}
    adapted = PeftModel.from_pretrained(compressed_model(), folders[3]).eval()
    for r in (2, 5, 3):
        hotswap.hotswap_adapter(adapted, folders[r], "default")
        expected = PeftModel.from_pretrained(compressed_model(), folders[r]).eval()
        torch.testing.assert_close(logits(adapted), logits(expected), **CLOSE)


def test_hot_swap_under_compile_does_not_recompile(tmp_path):
    folders = {r: random_adapter(additive(r=r), tmp_path / str(r), r) for r in (3, 5)}
    adapted = PeftModel.from_pretrained(compressed_model(), folders[3]).eval()
    hotswap.prepare_model_for_compiled_hotswap(adapted, target_rank=5)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="eager")
    logits(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap.hotswap_adapter(compiled, folders[5], "default")
        swapped = logits(compiled)
    expected = PeftModel.from_pretrained(compressed_model(), folders[5]).eval()
    torch.testing.assert_close(swapped, logits(expected), **CLOSE)


def test_hot_swap_of_replacing_adapters_under_compile(tmp_path):
    for seed in (1, 2):
        adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
        disturb(adapted, seed=seed)
        adapted.save_pretrained(tmp_path / str(seed))
    loaded = PeftModel.from_pretrained(compressed_model(), tmp_path / "1").eval()
    hotswap.prepare_model_for_compiled_hotswap(loaded, target_rank=8)
    torch._dynamo.reset()
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    logits(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap.hotswap_adapter(compiled, str(tmp_path / "2"), "default")
        torch.testing.assert_close(logits(compiled), logits(adapted), **CLOSE)


def test_transformers_hot_swap(tmp_path):
    folders = [random_adapter(additive(), tmp_path / str(seed), seed) for seed in (1, 2)]
    model = compressed_model()
    model.load_adapter(folders[0])
    model.load_adapter(folders[1], adapter_name="default", hotswap=True)
    expected = logits(PeftModel.from_pretrained(compressed_model(), folders[1]).eval())
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    hf_sparselr.as_peft_model(compressed_model()).save_pretrained(tmp_path / "replacing")
    with pytest.raises(ValueError, match="cannot hot-swap default"):
        model.load_adapter(str(tmp_path / "replacing"), adapter_name="default", hotswap=True)
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_hot_swap_of_replacing_adapters(tmp_path):
    for seed in (1, 2):
        adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
        disturb(adapted, seed=seed)
        adapted.save_pretrained(tmp_path / str(seed))
    expected = logits(adapted)
    loaded = PeftModel.from_pretrained(compressed_model(), tmp_path / "1").eval()
    hotswap.hotswap_adapter(loaded, str(tmp_path / "2"), "default")
    assert torch.equal(logits(loaded), expected)

    additive_one = random_adapter(additive(alpha_pattern=loaded.peft_config["default"].alpha_pattern), tmp_path / "3")
    with pytest.raises(ValueError, match="cannot hot-swap default: of the adapters"):
        hotswap.hotswap_adapter(loaded, additive_one, "default")
    model = compressed_model()
    config = hf_sparselr.lora_config(model, exclude_modules=["down_proj"])
    config.alpha_pattern = loaded.peft_config["default"].alpha_pattern
    get_peft_model(model, config).save_pretrained(tmp_path / "4")
    with pytest.raises(ValueError, match=r"no factors for .*down_proj"):
        hotswap.hotswap_adapter(loaded, str(tmp_path / "4"), "default")
    assert torch.equal(logits(loaded), expected)


# --- how it runs


def replacing_and_additive() -> PeftModel:
    model = hf_sparselr.as_peft_model(compressed_model())
    model.add_adapter("more", additive(init_lora_weights=False))
    disturb(model)
    model.base_model.set_adapter(["default", "more"])
    return model


def gradients(model: nn.Module, run=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run = model if run is None else run
    run(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing():
    model = replacing_and_additive().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert model.model.model.layers[0].gradient_checkpointing
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 2 * (13 + 6)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_compiles_without_graph_breaks():
    model = replacing_and_additive().train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)
    expected, found = gradients(model), gradients(model, compiled)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters_in_fp32", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(half, adapters_in_fp32, autocast):
    model = compressed_model(half)
    expected = logits(model.float())
    model = model.to(half)
    adapted = get_peft_model(model, additive(), autocast_adapter_dtype=adapters_in_fp32)
    wanted = torch.float32 if adapters_in_fp32 else half
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {wanted}
    with torch.autocast("cpu", dtype=half, enabled=autocast):
        found = logits(adapted.eval())
        grads = gradients(adapted)
    assert found.dtype == half
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    assert len(grads) == 2 * 6
    assert all(gradient.dtype == wanted and gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.parametrize("adapters_in_fp32", [False, True])
def test_fp32_base_under_autocast(adapters_in_fp32):
    adapted = get_peft_model(compressed_model(), additive(init_lora_weights=False))
    if not adapters_in_fp32:
        for layer in lora_layers(adapted).values():
            layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    expected = logits(adapted.eval())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(adapted)
    losses = train(adapted, 3, autocast=torch.bfloat16)
    torch.testing.assert_close(found.float(), expected.float(), atol=0.1, rtol=0.1)
    assert losses[-1] < losses[0]
