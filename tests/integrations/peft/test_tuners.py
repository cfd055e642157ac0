"""PEFT's other methods on a compressed model: they work beside its layers, or are refused before anything changes."""

import copy

import peft
import pytest
import torch
from helpers.peft_models import (
    IDS,
    TARGETS,
    additive,
    all_equal,
    base_tensors,
    compressed_model,
    dense_weights,
    disturb,
    logits,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.tuners.xlora.layer import XLoraLayer

import hf_sparselr
from hf_sparselr.integrations.peft.guards import BESIDE

TUNERS = {kind.value: cls for kind, cls in PEFT_TYPE_TO_TUNER_MAPPING.items() if issubclass(cls, BaseTuner)}
REFUSED = sorted(TUNERS.keys() - {*BESIDE, "LORA", "XLORA"})
ARGUMENTS = {
    "IA3": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 8},
    "BOFT": {"boft_block_size": 4},
    "ROAD": {"group_size": 8},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "WAVEFT": {"n_frequency": 20},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "r": 2, "topk": 2},
    "VERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "GRALORA": {"r": 4},
    "MISS": {"r": 4},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2},
    "ADALORA": {"total_step": 10},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
}
# Methods that leave the compressed layers alone: prompts, norms, embeddings, whole blocks.
ELSEWHERE = {
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "CPT": {
        "cpt_token_ids": [5, 6, 7, 8],
        "cpt_mask": [1, 1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 3, 4],
        "opt_projection_epsilon": 1.0,
    },
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": IDS[0].tolist()},
    "SHADOW": {},
}
INPUTS = {
    "POLY": {"task_ids": torch.zeros(3, dtype=torch.long)},
    "MULTITASK_PROMPT_TUNING": {"task_ids": torch.zeros(3, dtype=torch.long)},
}


def configure(kind: str, **arguments) -> peft.PeftConfig:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[getattr(peft.PeftType, kind)]
    try:
        return cls(task_type="CAUSAL_LM", **arguments)
    except ImportError as error:
        pytest.skip(str(error))


def check_life(config: peft.PeftConfig, inputs: dict, folder) -> None:
    """Training changes the output, disabling restores it, a reloaded adapter equals the saved one; all packed."""
    model = compressed_model()
    expected, before = logits(model), base_tensors(model)
    with dense_weights() as built:
        adapted = get_peft_model(model, config).eval()
        start = logits(adapted, **inputs)
        train(adapted, 2, lr=0.05, **inputs)
        trained = logits(adapted.eval(), **inputs)
        assert not torch.allclose(trained, start, atol=1e-3)
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted, **inputs), expected)
        adapted.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(compressed_model(), folder).eval()
        torch.testing.assert_close(logits(loaded, **inputs), trained)
    assert not built
    assert all_equal(base_tensors(adapted), before)


@pytest.mark.parametrize("kind", BESIDE)
def test_methods_beside_a_layer(kind, tmp_path):
    config = configure(kind, **{"target_modules": TARGETS, **ARGUMENTS.get(kind, {})})
    inputs = INPUTS.get(kind, {})
    check_life(config, inputs, tmp_path)
    model = compressed_model()
    expected, before = logits(model), base_tensors(model)
    adapted = get_peft_model(model, copy.deepcopy(config))
    train(adapted, 2, lr=0.05, **inputs)
    trained = logits(adapted.eval(), **inputs)
    for merge in (
        adapted.merge_adapter,
        lambda: adapted.merge_adapter(safe_merge=True),
        copy.deepcopy(adapted).merge_and_unload,
    ):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            merge()
    assert torch.equal(logits(adapted, **inputs), trained)
    with dense_weights() as built:
        restored = adapted.unload()
    assert not built
    assert torch.equal(logits(restored), expected)
    assert all_equal(base_tensors(restored), before)


def test_the_error_of_a_merge_says_what_merges_instead():
    adapted = get_peft_model(compressed_model(), peft.LoHaConfig(target_modules=TARGETS))
    with pytest.raises(RuntimeError, match=r"cannot be edited.*peft\.LoraConfig.*unload\(\)"):
        adapted.merge_adapter()


def test_a_method_that_merges_into_the_bias_may():
    config = configure("BEFT", target_modules=["up_proj"])
    adapted = get_peft_model(compressed_model(bias=True), config)
    train(adapted, 2, lr=0.05)
    trained = logits(adapted.eval())
    torch.testing.assert_close(logits(adapted.merge_and_unload()), trained)


@pytest.mark.parametrize("targets", [TARGETS, "all-linear", r".*\.(q|v)_proj"])
@pytest.mark.parametrize("kind", REFUSED)
def test_all_other_methods_are_refused(kind, targets):
    model = compressed_model()
    config = configure(kind, target_modules=targets, **ARGUMENTS.get(kind, {}))
    names = [name for name, _ in model.named_modules()]
    with (
        dense_weights() as built,
        pytest.raises(ValueError, match=f"'{kind}' reads or edits.*use LoraConfig"),
    ):
        get_peft_model(model, config)
    assert not built or kind == "FROD"  # which decomposes the weights before it injects anything
    assert [name for name, _ in model.named_modules()] == names


def test_the_default_targets_of_a_refused_method_are_refused():
    with pytest.raises(ValueError, match="'HRA' reads or edits"):
        get_peft_model(compressed_model(), peft.HRAConfig(target_modules=None, task_type="CAUSAL_LM"))
    keys = {"model.layers.0.mlp.up_proj.hra_u": torch.zeros(1)}
    with pytest.raises(ValueError, match="'HRA' reads or edits"):
        config = peft.HRAConfig(target_modules=["lm_head"])
        peft.inject_adapter_in_model(config, compressed_model(), state_dict=keys)


def test_a_refused_method_stays_usable_on_dense_layers():
    model = compressed_model()
    expected = logits(model)
    adapted = get_peft_model(model, peft.HRAConfig(target_modules=["lm_head"]))
    assert not torch.equal(adapted.lm_head.hra_u["default"], torch.zeros(()))
    torch.testing.assert_close(logits(adapted.eval()), expected)


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_methods_elsewhere_in_the_model(kind, tmp_path):
    if not hasattr(peft.PeftType, kind):
        pytest.skip(f"{kind} is newer than this PEFT")
    check_life(configure(kind, **ELSEWHERE[kind]), INPUTS.get(kind, {}), tmp_path)


@pytest.mark.parametrize("replacing", [False, True])
def test_x_lora_takes_additive_experts(replacing, tmp_path):
    for name in ("0", "1"):
        model = compressed_model()
        config = hf_sparselr.lora_config(model) if replacing else additive(init_lora_weights=False)
        adapted = get_peft_model(model, config)
        disturb(adapted, seed=int(name))
        adapted.save_pretrained(tmp_path / name)
    model = compressed_model()
    model.config.use_cache = False
    experts = {name: str(tmp_path / name) for name in ("0", "1")}
    config = peft.XLoraConfig(hidden_size=64, xlora_depth=2, adapters=experts, task_type="CAUSAL_LM")
    if replacing:
        with pytest.raises(ValueError, match="X-LoRA adds its experts"):
            get_peft_model(model, config)
        return
    expected = logits(compressed_model())
    with dense_weights() as built:
        adapted = get_peft_model(model, config)
        start = logits(adapted.eval())
        assert not torch.allclose(start, expected, atol=1e-3)
        train(adapted, 2, lr=0.05)
        assert not torch.allclose(logits(adapted.eval()), start, atol=1e-3)
        if hasattr(XLoraLayer, "adapters_disabled"):  # older PEFT mixes the experts in all the same
            with adapted.disable_adapter():
                assert torch.equal(logits(adapted), expected)
    assert not built


def test_mixed_models():
    model = compressed_model()
    expected = logits(model)
    adapted = get_peft_model(model, additive(init_lora_weights=False), mixed=True)
    adapted.add_adapter("loha", peft.LoHaConfig(target_modules=["up_proj"], init_weights=False))
    with dense_weights() as built:
        lora = logits(adapted.eval())
        adapted.set_adapter(["default", "loha"])
        assert not torch.allclose(logits(adapted), lora, atol=1e-3)
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), expected)
    assert not built
    with pytest.raises(RuntimeError, match="cannot be edited"):
        adapted.merge_and_unload()
    with pytest.raises(ValueError, match="'SHIRA' reads or edits"):
        adapted.add_adapter("shira", peft.ShiraConfig(target_modules=["o_proj"], r=2))
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        adapted.add_adapter("pissa", LoraConfig(init_lora_weights="pissa", target_modules=["o_proj"]))
