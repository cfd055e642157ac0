"""LoRA on compressed models, through PEFT's and transformers' public interfaces."""

import copy
import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparselr
from hf_sparselr.integrations.lora_layer import SparseLRLoraLayer
from hf_sparselr.modules import SparseLRLinear
from hf_sparselr.solvers import Decomposition

IDS = torch.randint(0, 128, (3, 12), generator=torch.Generator().manual_seed(7))
RANKS = {"layers.0.self_attn.v_proj": 2, "layers.1.mlp.down_proj": 6, "layers.1.self_attn.q_proj": 0}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def compressed_linear(dense: nn.Linear, rank: int, seed: int) -> SparseLRLinear:
    """A random 2:4 S with the given rank and no relation to the dense weight."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = dense.weight.shape
    keep = torch.rand(rows, columns // 4, 4, generator=g).argsort(-1) < 2
    mask = keep.reshape(rows, columns)
    S = torch.randn(rows, columns, generator=g) * 0.1 * mask
    A = torch.randn(rank, columns, generator=g) * 0.1 if rank else None
    B = torch.randn(rows, rank, generator=g) * 0.3 if rank else None
    bias = torch.randn(rows, generator=g) if dense.bias is not None else None
    return SparseLRLinear.from_decomposition(Decomposition(S, mask, A, B), bias)


def compressed_model(
    dtype: torch.dtype = torch.float32, layers: int = 2, ranks: dict[str, int] = RANKS, bias: bool = False
) -> LlamaForCausalLM:
    """A tiny Llama whose linear layers have rank 4, or the rank of the first name in `ranks` they end in."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=layers, mlp_bias=bias, **sizes)
    model = LlamaForCausalLM(config)
    dense = [(name, m) for name, m in model.model.named_modules() if isinstance(m, nn.Linear)]
    for seed, (name, module) in enumerate(dense):
        rank = next((r for end, r in ranks.items() if name.endswith(end)), 4)
        model.model.set_submodule(name, compressed_linear(module, rank, seed))
    return model.to(dtype).eval()


def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def lora_layers(model: nn.Module) -> dict[str, SparseLRLoraLayer]:
    modules = model.named_modules()
    return {name[name.index("layers.") :]: m for name, m in modules if isinstance(m, SparseLRLoraLayer)}


def disturb(model: nn.Module, adapter: str = "default") -> None:
    """Moves an adapter away from its start, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name and "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))


def additive(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **kwargs})


@pytest.fixture
def reference() -> torch.Tensor:
    return logits(compressed_model())


@pytest.fixture
def no_densify(monkeypatch):
    def weight(self):
        raise RuntimeError("densified")

    monkeypatch.setattr(SparseLRLinear, "weight", property(weight))


# --- the existing factors as an adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_equals_the_compressed_model_to_the_bit(dtype):
    model = compressed_model(dtype)
    expected = logits(model)
    adapted = hf_sparselr.as_peft_model(model).eval()
    assert torch.equal(logits(adapted), expected)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {dtype}


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
    assert (
        hf_sparselr.lora_config(compressed_model(), task_type="FEATURE_EXTRACTION").task_type != "CAUSAL_LM"
    )


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


def test_trained_replacing_adapter_replaces_and_disabling_brings_the_factors_back(reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    disturb(adapted)
    layer = lora_layers(adapted)["layers.0.mlp.up_proj"]
    x = torch.randn(5, 64)
    with torch.no_grad():
        low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = layer.base_layer.sparse_forward(x) + x @ low_rank.T
        torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(logits(adapted), reference, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), reference)


# --- additive adapters


def test_additive_all_linear_starts_as_the_compressed_model(reference):
    adapted = get_peft_model(compressed_model(), LoraConfig(target_modules="all-linear")).eval()
    assert len(lora_layers(adapted)) == 14
    assert torch.equal(logits(adapted), reference)
    disturb(adapted)
    assert not torch.allclose(logits(adapted), reference, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), reference)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_allowed_initialisations(init, reference):
    adapted = get_peft_model(compressed_model(), additive(r=4, init_lora_weights=init)).eval()
    layer = lora_layers(adapted)["layers.0.mlp.down_proj"]
    assert layer.lora_A["default"].weight.any()
    if init is not False:
        torch.testing.assert_close(logits(adapted), reference, atol=1e-5, rtol=1e-5)
    if init == "orthogonal":
        assert layer.lora_B["default"].weight.any()


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ValueError, match="even rank, got 3"):
        get_peft_model(compressed_model(), additive(init_lora_weights="orthogonal"))


def test_replacing_and_additive_adapters_add_up():
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    adapted.add_adapter("more", additive(init_lora_weights=False))
    disturb(adapted)
    adapted.base_model.set_adapter(["more", "default"])
    layer = lora_layers(adapted)["layers.0.mlp.down_proj"]
    x = torch.randn(5, 96)
    with torch.no_grad():
        new, more = (layer.lora_B[n].weight @ layer.lora_A[n].weight for n in ("default", "more"))
        expected = layer.base_layer.sparse_forward(x) + x @ (new + 2 * more).T
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


def test_two_replacing_adapters_at_once_are_refused():
    model = compressed_model()
    adapted = hf_sparselr.as_peft_model(model)
    adapted.add_adapter("second", hf_sparselr.lora_config(model))
    adapted.base_model.set_adapter(["default", "second"])
    for use in (lambda: logits(adapted), adapted.merge_adapter):
        with pytest.raises(ValueError, match="default, second each replace"):
            use()


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
    rows = ["more", "__base__", "default"]
    mixed = logits(adapted, adapter_names=rows)
    torch.testing.assert_close(mixed[1], reference[1])
    for row in (0, 2):
        adapted.set_adapter(rows[row])
        torch.testing.assert_close(mixed[row], logits(adapted)[row])


def test_weighted_adapters_keep_their_kind():
    model = compressed_model()
    adapted = hf_sparselr.as_peft_model(model).eval()
    adapted.add_adapter("second", hf_sparselr.lora_config(model))
    adapted.add_adapter("more", additive())
    disturb(adapted, "default")
    with pytest.raises(ValueError, match="cannot mix default, more"):
        adapted.base_model.add_weighted_adapter(["default", "more"], [1, 1], "sum", combination_type="cat")
    expected = logits(adapted)
    adapted.base_model.add_weighted_adapter(["default", "second"], [1, 0], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    torch.testing.assert_close(logits(adapted), expected)


# --- what cannot work is refused before anything changes


@pytest.mark.parametrize(
    "field, value",
    [
        *(("init_lora_weights", v) for v in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "mica")),
        ("use_dora", True),
        ("alora_invocation_tokens", [1]),
    ],
)
@pytest.mark.parametrize("target", [TARGETS, "all-linear", r".*_proj"])
def test_unsupported_variants(field, value, target, reference):
    model = compressed_model()
    with pytest.raises(ValueError, match=f"{field}=.*compressed layer"):
        get_peft_model(model, LoraConfig(**{field: value}, target_modules=target, task_type="CAUSAL_LM"))
    assert not lora_layers(model)
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


def test_adalora_is_refused():
    with pytest.raises(ValueError, match="use LoraConfig"):
        get_peft_model(compressed_model(), peft.AdaLoraConfig(target_modules=TARGETS, total_step=10))


# --- merging


def sparse_parts(model: nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, SparseLRLinear)]
    return [t.detach().clone() for m in layers for t in (m.mask, m.values)]


def all_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_merging_a_replacing_adapter(reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    before = sparse_parts(adapted)
    disturb(adapted)
    expected = logits(adapted)
    adapted.merge_adapter(safe_merge=True)
    assert torch.equal(logits(adapted), expected)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), reference)
    merged = adapted.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert all_equal(sparse_parts(merged), before)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert isinstance(merged.model.layers[0].mlp.up_proj, SparseLRLinear)
    assert not merged.model.layers[0].mlp.up_proj.A.requires_grad


def test_merging_an_additive_adapter_concatenates(reference):
    adapted = get_peft_model(compressed_model(), additive(init_lora_weights=False)).eval()
    before = sparse_parts(adapted)
    expected = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), expected)
    with adapted.disable_adapter():  # also unmerges
        assert torch.equal(logits(adapted), reference)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert all_equal(sparse_parts(merged), before)
    ranks = {name: m.rank for name, m in merged.model.named_modules() if isinstance(m, SparseLRLinear)}
    assert ranks["layers.1.self_attn.q_proj"] == 3
    assert ranks["layers.1.mlp.down_proj"] == 9
    assert ranks["layers.1.mlp.up_proj"] == 4


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


def test_unload_gives_the_compressed_model_back(reference):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    disturb(adapted)
    restored = adapted.unload()
    assert not lora_layers(restored)
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


# --- saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapter_reloads_to_the_bit(tmp_path, dtype):
    adapted = hf_sparselr.as_peft_model(compressed_model(dtype)).eval()
    disturb(adapted)
    adapted.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == "sparselr"
    for low_cpu_mem_usage in (False, True):
        options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(compressed_model(dtype), tmp_path, **options).eval()
        assert torch.equal(logits(loaded), logits(adapted))
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), logits(compressed_model(dtype)))


@pytest.mark.parametrize("kind", ["replacing", "additive"])
def test_transformers_load_adapter(tmp_path, kind):
    model = compressed_model()
    config = hf_sparselr.lora_config(model) if kind == "replacing" else additive(init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    disturb(adapted)
    adapted.save_pretrained(tmp_path)
    fresh = compressed_model()
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(logits(fresh), logits(adapted))


def test_replacing_adapter_converts_to_an_additive_one(tmp_path):
    adapted = hf_sparselr.as_peft_model(compressed_model()).eval()
    adapted.save_pretrained(tmp_path / "start")
    disturb(adapted)
    adapted.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = PeftModel.from_pretrained(compressed_model(), tmp_path / "lora").eval()
    assert loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(loaded), logits(adapted))


def test_adapter_of_another_compressed_model_is_refused(tmp_path):
    hf_sparselr.as_peft_model(compressed_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compressed model that it was made for"):
        PeftModel.from_pretrained(compressed_model(ranks={"v_proj": 8}), tmp_path)


# --- training


def train(model: nn.Module, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["replacing", "additive"])
def test_training_lowers_the_loss_and_leaves_the_base_as_it_is(kind):
    model = compressed_model()
    config = (
        hf_sparselr.lora_config(model) if kind == "replacing" else LoraConfig(target_modules="all-linear")
    )
    adapted = get_peft_model(model, config)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name


def test_gradient_reaches_the_inputs():
    adapted = hf_sparselr.as_peft_model(compressed_model())
    layer = lora_layers(adapted)["layers.0.mlp.up_proj"]
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach().requires_grad_()
    nn.functional.linear(y, layer.base_layer.weight).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_nothing_is_densified(no_densify, tmp_path):
    for name in ("replacing", "additive", "orthogonal"):
        model = compressed_model()
        config = {
            "replacing": hf_sparselr.lora_config(model),
            "additive": LoraConfig(target_modules="all-linear"),
            "orthogonal": additive(r=2, init_lora_weights="orthogonal"),
        }[name]
        adapted = get_peft_model(model, config)
        train(adapted, 2)
        adapted.save_pretrained(tmp_path / name)
        logits(PeftModel.from_pretrained(compressed_model(), tmp_path / name))
        adapted.merge_adapter(safe_merge=True)
        adapted.unmerge_adapter()
        logits(adapted.eval(), adapter_names=["default", "__base__", "default"])
        logits(adapted.merge_and_unload())
