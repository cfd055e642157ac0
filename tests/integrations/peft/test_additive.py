"""Ordinary LoRA configs on a compressed model, against PEFT's own layers on its dense twin."""

import copy

import peft
import pytest
import torch
from helpers.peft_models import (
    CLOSE,
    IDS,
    TARGETS,
    additive,
    all_equal,
    base_tensors,
    compressed_model,
    dense_twin,
    dense_weights,
    disturb,
    layers_of,
    load_pair,
    logits,
    lora_layers,
    random_adapter,
    train,
)
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import intruders
from torch import nn

import hf_sparselr

# --- which layers, which rank and scale


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"target_modules": None, "task_type": "CAUSAL_LM"},
        {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {
            "rank_pattern": {"down_proj": 5, r"^model\.layers\.0\.self_attn\.q_proj": 1},
            "alpha_pattern": {"v_proj": 11},
        },
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"lora_dropout": 0.3},
        {"init_lora_weights": "orthogonal", "r": 4},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_configs_do_what_they_do_on_dense_layers(arguments, tmp_path):
    with dense_weights() as built:
        folder = random_adapter(additive(**arguments), tmp_path)
    assert not built
    packed, dense = load_pair({"default": folder})
    assert packed.base_model.targeted_module_names == dense.base_model.targeted_module_names
    torch.testing.assert_close(logits(packed), logits(dense), **CLOSE)
    assert not torch.allclose(logits(packed), logits(compressed_model()), atol=1e-3)
    for name, layer in lora_layers(packed).items():
        other = dense.get_submodule(f"base_model.model.model.{name}")
        assert (layer.r, layer.scaling) == (other.r, other.scaling)


def test_all_linear_starts_as_the_compressed_model(reference):
    adapted = get_peft_model(compressed_model(), LoraConfig(target_modules="all-linear")).eval()
    assert len(lora_layers(adapted)) == 14
    assert torch.equal(logits(adapted), reference)
    disturb(adapted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), reference)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_allowed_initialisations(init, low_cpu_mem_usage, reference, tmp_path):
    config = additive(r=4, init_lora_weights=init)
    adapted = get_peft_model(compressed_model(), config).eval()
    layer = lora_layers(adapted)["layers.0.mlp.down_proj"]
    assert layer.lora_A["default"].weight.any()
    if init is not False:
        torch.testing.assert_close(logits(adapted), reference, atol=1e-5, rtol=1e-5)
    if init == "orthogonal":
        assert layer.lora_B["default"].weight.any()
    disturb(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(compressed_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(adapted))


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ValueError, match="even, got 3"):
        get_peft_model(compressed_model(), additive(init_lora_weights="orthogonal"))


def test_eva_initialisation_from_data():
    config = additive(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    adapted = get_peft_model(compressed_model(), config, low_cpu_mem_usage=True)
    with dense_weights() as built:
        peft.initialize_lora_eva_weights(adapted, [{"input_ids": IDS}] * 4)
    assert not built
    A = lora_layers(adapted)["layers.0.mlp.down_proj"].lora_A["default"].weight
    torch.testing.assert_close(A @ A.T, torch.eye(3), atol=1e-4, rtol=0)


def test_replicated_layers(tmp_path):
    folder = random_adapter(additive(layer_replication=[[0, 2], [0, 2]]), tmp_path)
    packed, dense = load_pair({"default": folder})
    assert len(lora_layers(packed)) == 12
    torch.testing.assert_close(logits(packed), logits(dense), **CLOSE)


# --- what else is trained and saved


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_and_are_saved(bias, tmp_path):
    targets = ["q_proj", "up_proj"]
    adapted = get_peft_model(compressed_model(bias=True), additive(bias=bias, target_modules=targets))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if n.endswith(".bias")}
    train(adapted, 3)
    moved = {n for n, p in adapted.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved == {n for n in before if bias == "all" or "up_proj" in n}
    adapted.save_pretrained(tmp_path)
    if bias == "lora_only" and version.parse(peft.__version__) < version.parse("0.21"):
        pytest.skip("this PEFT leaves such biases out of the file, of dense layers too")
    loaded = PeftModel.from_pretrained(compressed_model(bias=True), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(adapted.eval()))


def test_modules_to_save_and_trained_tokens(tmp_path, reference):
    arguments = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": IDS[0].tolist()}}
    adapted = get_peft_model(compressed_model(), additive(**arguments))
    train(adapted, 3)
    trained = logits(adapted.eval())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), reference)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(compressed_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), trained)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), trained, **CLOSE)


@pytest.mark.parametrize("name", ["up_proj", "mlp", "layers.1"])
def test_modules_to_save_does_not_copy_compressed_layers(name):
    model = compressed_model()
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"modules_to_save selects model\.layers"):
        get_peft_model(model, additive(modules_to_save=[name]))
    assert [n for n, _ in model.named_modules()] == names


@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "q_proj.values", "layers.0.mlp.up_proj.A", "weight"])
@pytest.mark.parametrize("modules", [[], ["v_proj"]])
def test_lora_on_the_tensors_of_a_compressed_layer_is_refused(name, modules):
    model = compressed_model()
    with pytest.raises(ValueError, match=f"target_parameters='{name}' selects .* put it into target_modules"):
        get_peft_model(model, LoraConfig(target_parameters=[name], target_modules=modules))
    assert not lora_layers(model)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_preparing_for_training_as_a_quantized_model(checkpointing):
    model = compressed_model(torch.bfloat16)
    before = base_tensors(model)
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    assert prepared is model and model.is_gradient_checkpointing == checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert all_equal(base_tensors(model), before) and not hasattr(model, "quantization_method")
    adapted = get_peft_model(model, additive()).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert grads == {n for n, p in adapted.named_parameters() if "lora_" in n}


# --- several adapters


def test_several_active_adapters_add_up(tmp_path):
    folders = {name: random_adapter(additive(r=r), tmp_path / name, r) for name, r in {"one": 2, "two": 3}.items()}
    packed, dense = load_pair(folders)
    for names in (["one"], ["two"], ["one", "two"]):
        for model in (packed, dense):
            model.base_model.set_adapter(names)
        torch.testing.assert_close(logits(packed), logits(dense), **CLOSE)
    rows = ["two", "__base__", "one"]
    torch.testing.assert_close(logits(packed, adapter_names=rows), logits(dense, adapter_names=rows), **CLOSE)
    packed.delete_adapter("one")
    packed.set_adapter("two")
    dense.set_adapter("two")
    torch.testing.assert_close(logits(packed), logits(dense), **CLOSE)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_weighted_adapters(kind, tmp_path):
    folders = {name: random_adapter(additive(), tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    options = {"density": 0.5} if "ties" in kind or "prune" in kind else {}
    packed, dense = load_pair(folders)
    with dense_weights() as built:
        for model in (packed, dense):
            model.base_model.add_weighted_adapter(["one", "two"], [0.7, 0.2], "sum", kind, **options)
            model.set_adapter("sum")
    assert not built
    torch.testing.assert_close(logits(packed), logits(dense), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_weighted_adapters_with_random_pruning(kind, tmp_path):
    folders = {name: random_adapter(additive(), tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    for model in (pair := load_pair(folders)):
        torch.manual_seed(0)
        model.base_model.add_weighted_adapter(["one", "two"], [0.7, 0.2], "sum", kind, density=0.5)
        model.set_adapter("sum")
    torch.testing.assert_close(logits(pair[0]), logits(pair[1]), atol=1e-4, rtol=1e-4)


# --- training


def test_training_leaves_the_base_as_it_is():
    adapted = get_peft_model(compressed_model(), LoraConfig(target_modules="all-linear"))
    before = base_tensors(adapted)
    with dense_weights() as built:
        losses = train(adapted)
    assert not built
    assert losses[-1] < losses[0] - 0.05
    assert all_equal(base_tensors(adapted), before)


# --- what cannot work is refused before anything changes


@pytest.mark.parametrize(
    "field, value",
    [
        *(("init_lora_weights", v) for v in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica")),
        ("use_dora", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
    ],
)
@pytest.mark.parametrize("target", [TARGETS, "all-linear", r".*_proj"])
def test_unsupported_variants(field, value, target, reference):
    model = compressed_model()
    config = LoraConfig(target_modules=target, task_type="CAUSAL_LM")
    setattr(config, field, value)  # the constructor would ask for packages that some of them need
    with dense_weights() as built, pytest.raises(ValueError, match=f"{field}=.*compressed layer"):
        get_peft_model(model, config)
    assert not built and not lora_layers(model)
    assert torch.equal(logits(model), reference)


def test_unsupported_variant_is_refused_before_an_earlier_dense_layer_is_edited():
    model = compressed_model()
    dense = model.model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=False)
    before = dense.weight.detach().clone()
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        get_peft_model(model, LoraConfig(init_lora_weights="pissa", target_modules=TARGETS))
    assert torch.equal(dense.weight, before)
    assert model.model.layers[0].self_attn.q_proj is dense


def test_unsupported_variant_is_refused_where_a_state_dict_selects_the_layers():
    keys = {"model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(8, 64)}
    config = LoraConfig(use_dora=True, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="use_dora=True"):
        peft.inject_adapter_in_model(config, compressed_model(), state_dict=keys)


def test_unsupported_variants_stay_usable_on_dense_layers(reference):
    adapted = get_peft_model(compressed_model(), LoraConfig(use_dora=True, target_modules=["lm_head"]))
    torch.testing.assert_close(logits(adapted.eval()), reference)


# --- PEFT's own conversions


def test_another_method_converts_to_lora(tmp_path):
    config = peft.LoHaConfig(target_modules=TARGETS, r=2, init_weights=False)
    adapted = get_peft_model(compressed_model(), config).eval()
    with dense_weights() as built:
        peft.tuners.lora.save_as_lora(tmp_path, adapted, rank=4)
    assert not built
    loaded = PeftModel.from_pretrained(compressed_model(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-4, rtol=1e-4)


def test_intruders_are_removed_as_on_dense_layers(tmp_path):
    pair = load_pair({"default": random_adapter(additive(init_lora_weights=False), tmp_path)})
    for model in pair:
        intruders.reduce_intruder_dimension(model, threshold_epsilon=0.9, logging_sink=None)
    before = logits(PeftModel.from_pretrained(compressed_model(), tmp_path).eval())
    torch.testing.assert_close(logits(pair[0]), logits(pair[1]), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(pair[0]), before, atol=1e-3)


def test_conversions_that_would_mistake_a_replacing_adapter_for_an_additive_one():
    adapted = hf_sparselr.as_peft_model(compressed_model())
    with pytest.raises(TypeError, match="SparseLRLoraLayer"):
        peft.tuners.lora.convert_to_lora(adapted, rank=4)
    with pytest.raises(ValueError, match="replaces the model's factors"):
        intruders.reduce_intruder_dimension(adapted)


def test_the_twin_is_a_reference(reference):
    twin = dense_twin(compressed_model())
    assert not layers_of(twin, hf_sparselr.SparseLRLinear)
    torch.testing.assert_close(logits(twin), reference, **CLOSE)
    assert copy.deepcopy(twin).model.layers[0].mlp.up_proj.weight.shape == (96, 64)
