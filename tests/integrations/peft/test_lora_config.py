"""The factors of a compressed model as a PEFT adapter that replaces them."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers.peft_models import (
    IDS,
    RANKS,
    additive,
    all_equal,
    base_tensors,
    compressed_model,
    dense_twin,
    dense_weights,
    disturb,
    layers_of,
    logits,
    lora_layers,
    train,
)
from peft import LoraConfig, get_peft_model
from torch import nn

import hf_sparselr
from hf_sparselr.nn.linear import SparseLRLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_start_equals_the_compressed_model_to_the_bit(dtype):
    model = compressed_model(dtype)
    expected = logits(model)
    adapted = hf_sparselr.as_peft_model(model).eval()
    assert torch.equal(logits(adapted), expected)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {dtype}


@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
@pytest.mark.parametrize("rows", [1, 3])
def test_start_and_merge_are_exact_however_the_product_is_computed(kernel, rows):
    model = compressed_model(bias=True)
    for layer in layers_of(model, SparseLRLinear).values():
        layer.kernel = kernel
    ids = IDS[:1, :rows]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        adapted = hf_sparselr.as_peft_model(model, lora_dropout=0.5).eval()
        assert torch.equal(adapted(input_ids=ids).logits, expected)
        disturb(adapted)
        trained = adapted(input_ids=ids).logits
        assert not torch.allclose(trained, expected, atol=1e-3)
        with adapted.disable_adapter():
            assert torch.equal(adapted(input_ids=ids).logits, expected)
        assert torch.equal(adapted.merge_and_unload()(input_ids=ids).logits, trained)


def test_hooks_on_an_adapter_are_called():
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    disturb(adapted)
    expected, seen = logits(adapted), []
    layer = lora_layers(adapted)["layers.0.mlp.up_proj"]
    hook = layer.lora_A["default"].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(logits(adapted), expected)
    assert seen == [(*IDS.shape, 4)]
    hook.remove()
    add_hook_to_module(layer.lora_B["default"], AlignDevicesHook("cpu", offload=True))
    assert layer.lora_B["default"].weight.is_meta
    torch.testing.assert_close(logits(adapted), expected)


def test_start_with_fp32_adapters_over_bf16_stays_close():
    model = compressed_model(torch.bfloat16)
    expected = logits(model)
    adapted = get_peft_model(model, hf_sparselr.lora_config(model)).eval()
    assert logits(adapted).dtype == torch.bfloat16
    torch.testing.assert_close(logits(adapted), expected, atol=0.03, rtol=0.03)


def test_every_layer_has_its_own_rank_and_rank_zero_has_none():
    adapted = hf_sparselr.as_peft_model(compressed_model())
    layers = lora_layers(adapted)
    assert len(layers) == 13
    assert "layers.1.self_attn.q_proj" not in layers
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    for name, layer in layers.items():
        assert layer.r["default"] == layer.lora_A["default"].weight.shape[0] == RANKS.get(name, 4)


def test_config_fields():
    config = hf_sparselr.lora_config(compressed_model(), lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (6, 6, 0.1)
    assert config.task_type == "CAUSAL_LM"
    assert config.alpha_pattern == config.rank_pattern
    assert config.rank_pattern[r"^model\.layers\.0\.self_attn\.v_proj"] == 2
    assert hf_sparselr.lora_config(compressed_model(), task_type="FEATURE_EXTRACTION").task_type != "CAUSAL_LM"


@pytest.mark.parametrize("ranks", [RANKS, {"layers.3.self_attn.o_proj": 0, "layers.10.mlp.up_proj": 0}, {}])
def test_many_layers_target_exactly_the_layers_with_factors(ranks):
    model = compressed_model(layers=12, ranks=ranks)
    expected = logits(model)
    names = {n for n, m in model.named_modules() if isinstance(m, SparseLRLinear) and m.rank}
    adapted = hf_sparselr.as_peft_model(model).eval()
    assert set(adapted.base_model.targeted_module_names) == names
    assert torch.equal(logits(adapted), expected)


def test_a_longer_name_with_the_same_end_is_refused():
    model = compressed_model()
    model.other = nn.Module()
    model.other.model = nn.Module()
    model.other.model.layers = nn.ModuleList([nn.Module()])
    model.other.model.layers[0].self_attn = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"exclude_modules=\['other\.model\.layers\.0\.self_attn\.q_proj'\]"):
        hf_sparselr.lora_config(model)
    config = hf_sparselr.lora_config(model, exclude_modules=["other.model.layers.0.self_attn.q_proj"])
    assert len(get_peft_model(model, config).base_model.targeted_module_names) == 13


@pytest.mark.parametrize(
    "name",
    [
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
        *("target_modules", "init_lora_weights", "use_rslora", "use_dora"),
    ],
)
def test_arguments_that_are_derived_are_refused(name):
    with pytest.raises(ValueError, match=f"sets {name} itself"):
        hf_sparselr.lora_config(compressed_model(), **{name: 4})


def test_leaving_layers_out():
    model = compressed_model()
    expected = logits(model)
    for name, value in {"layers_to_transform": [0], "layers_pattern": "layers"}.items():
        with pytest.raises(ValueError, match=f"PEFT ignores {name}: leave layers out with exclude_modules"):
            hf_sparselr.lora_config(model, **{name: value})
    adapted = hf_sparselr.as_peft_model(model, exclude_modules=r".*layers\.1\..*").eval()
    assert len(lora_layers(adapted)) == 7 and all(".1." not in name for name in lora_layers(adapted))
    assert torch.equal(logits(adapted), expected)


def test_model_without_factors_is_refused():
    with pytest.raises(ValueError, match="no compressed layer"):
        hf_sparselr.lora_config(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="no compressed layer"):
        hf_sparselr.lora_config(compressed_model(ranks={"proj": 0}))


def test_replacing_adapter_on_a_layer_it_does_not_fit_is_refused():
    for target, problem in {"v_proj": "rank 2", "q_proj": "rank is 0"}.items():
        config = LoraConfig(init_lora_weights="sparselr", r=2, target_modules=[target])
        with pytest.raises(ValueError, match=problem):
            get_peft_model(compressed_model(ranks={"0.self_attn.v_proj": 3, "0.self_attn.q_proj": 0}), config)


@pytest.mark.parametrize(("r", "alpha"), [(4, 4), (7, 7), (4, 8), (7, 3)])
def test_replacing_adapter_of_a_users_own_rank_and_scale(r, alpha):
    model = compressed_model()
    expected = logits(model)
    config = LoraConfig(init_lora_weights="sparselr", r=r, lora_alpha=alpha, target_modules=["up_proj"])
    adapted = get_peft_model(model, config).eval()
    torch.testing.assert_close(logits(adapted), expected)
    disturb(adapted)
    layer = lora_layers(adapted)["layers.0.mlp.up_proj"]
    x, A, B = torch.randn(5, 64), layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x, factors=(None, None)) + alpha / r * B(A(x)))


def test_trained_replacing_adapter_replaces_and_disabling_brings_the_factors_back(reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    disturb(adapted)
    layer = lora_layers(adapted)["layers.0.mlp.up_proj"]
    x = torch.randn(5, 64)
    with torch.no_grad():
        low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = layer.base_layer(x, factors=(None, None)) + x @ low_rank.T
        torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(logits(adapted), reference, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), reference)


def test_replacing_and_additive_adapters_add_up():
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    adapted.add_adapter("more", additive(init_lora_weights=False))
    disturb(adapted)
    adapted.base_model.set_adapter(["more", "default"])
    layer = lora_layers(adapted)["layers.0.mlp.down_proj"]
    x = torch.randn(5, 96)
    with torch.no_grad():
        new, more = (layer.lora_B[n].weight @ layer.lora_A[n].weight for n in ("default", "more"))
        expected = layer.base_layer(x, factors=(None, None)) + x @ (new + 2 * more).T
        torch.testing.assert_close(layer(x), expected)
        adapted.base_model.set_adapter("more")
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 2 * x @ more.T)


def test_replacing_adapter_added_beside_an_additive_one(reference):
    base = compressed_model()
    adapted = get_peft_model(base, additive()).eval()
    adapted.add_adapter("factors", hf_sparselr.lora_config(adapted))
    adapted.set_adapter("factors")
    assert torch.equal(logits(adapted), reference)
    assert lora_layers(adapted)["layers.1.mlp.down_proj"].r == {"default": 3, "factors": 6}


def test_dropout_acts_on_the_adapter_only_in_training():
    model = compressed_model()
    expected = logits(model)
    adapted = hf_sparselr.as_peft_model(model, lora_dropout=0.5)
    assert torch.equal(logits(adapted.eval()), expected)
    assert not torch.allclose(logits(adapted.train()), expected)


def test_mixed_batch(reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    adapted.add_adapter("more", additive(init_lora_weights=False))
    disturb(adapted)
    rows = ["more", "__base__", "default", "__base__", "more", "default"]
    with torch.no_grad():
        mixed = adapted(input_ids=IDS.repeat(2, 1), adapter_names=rows).logits
    expected = {"__base__": reference}
    for name in ("more", "default"):
        adapted.set_adapter(name)
        expected[name] = logits(adapted)
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], expected[name][row % 3])


def test_a_replacing_adapter_on_a_dense_model_is_refused():
    config = hf_sparselr.lora_config(compressed_model())
    for model in (dense_twin(compressed_model()), compressed_model(ranks={"q_proj": 4})):
        model.model.layers[0].mlp.up_proj = nn.Linear(64, 96, bias=False)
        with pytest.raises(ValueError, match=r"no compressed layers .*layers\.0\.mlp\.up_proj"):
            get_peft_model(model, copy.deepcopy(config))
        assert not lora_layers(model)


def test_training_lowers_the_loss_and_leaves_the_base_as_it_is():
    adapted = hf_sparselr.as_peft_model(compressed_model())
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 13 and all(".lora_" in name for name in trainable)
    before = base_tensors(adapted)
    with dense_weights() as built:
        losses = train(adapted)
    assert not built
    assert losses[-1] < losses[0] - 0.05
    assert all_equal(base_tensors(adapted), before)


def test_the_disabled_adapter_is_the_reference_of_a_preference_loss(reference):
    adapted, frozen = hf_sparselr.as_peft_model(compressed_model(), "policy"), compressed_model()
    assert adapted.active_adapters == ["policy"]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    chosen, rejected = IDS[:1], IDS[1:2]

    def margin(model: nn.Module) -> torch.Tensor:
        scores = []
        for ids in (chosen, rejected):
            tokens = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            scores.append(tokens.gather(-1, ids[:, 1:, None]).sum())
        return scores[0] - scores[1]

    losses = []
    for _ in range(5):
        policy = margin(adapted.train())
        with torch.no_grad(), adapted.disable_adapter():
            base = margin(adapted)
            assert torch.equal(base, margin(frozen))
        loss = -nn.functional.logsigmoid(0.1 * (policy - base))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)  # the policy starts as the reference
    assert losses[-1] < losses[0] - 0.02
    assert torch.equal(logits(adapted.unload().eval()), reference)


def test_gradients_equal_those_of_the_dense_layer():
    adapted = hf_sparselr.as_peft_model(compressed_model())
    layer = lora_layers(adapted)["layers.0.mlp.up_proj"]
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    A, B = (factors["default"].weight.detach().requires_grad_() for factors in (layer.lora_A, layer.lora_B))
    y, base = x.detach().requires_grad_(), layer.base_layer
    S = (base.weight - base.B @ base.A).detach()
    (y @ (S + B @ A).T).square().sum().backward()
    for found, expected in ((x, y), (layer.lora_A["default"].weight, A), (layer.lora_B["default"].weight, B)):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4)
