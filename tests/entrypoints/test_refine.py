"""refine: pruned models and base + LoRA pairs, refined against a dense reference and packed."""

import json

import pytest
import torch
from helpers import tiny
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_sparselr
from hf_sparselr import compress, refine
from hf_sparselr.compression.model_structure import linear_layers
from hf_sparselr.compression.plan import plan_layers
from hf_sparselr.compression.report import Report
from hf_sparselr.format.bitmask import unpack, unpack_mask
from hf_sparselr.format.patterns import NM, Pattern, Unstructured, project
from hf_sparselr.nn.linear import packed_layers
from hf_sparselr.solvers.registry import PRECOMPUTED

TM = {"passes": 4, "batch_size": 4, "lr": 3e-4, "relative_lr": False}
STILL = {"passes": 1, "batch_size": 4, "lr": 1e-12}  # as good as no step
FIELDS = {"calibration": tiny.IDS, "num_samples": 4, "seq_len": 32, "noisy_windows": 0.0}


def config(tm=TM, **changes) -> hf_sparselr.SparseLRConfig:
    """Without sparsity and rank: recorded as found."""
    return hf_sparselr.SparseLRConfig(**{**FIELDS, "refine": "tm", "tm": tm, **changes})


def weight_of(layer) -> torch.Tensor:
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight


@torch.no_grad()
def pruned(name: str, pattern: Pattern, dtype=torch.float32):
    """A dense model with zeros: the largest weights are kept."""
    model = tiny.build(name, dtype)
    for layer in linear_layers(model).values():
        weight = weight_of(layer)
        weight.copy_(project(weight, pattern)[0])
    return model


def with_lora(model, r: int = 4, **changes) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": r, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(**fields)).eval()


def supports(model) -> dict[str, torch.Tensor]:
    return {name: weight_of(layer) != 0 for name, layer in linear_layers(model).items()}


def masks(model) -> dict[str, torch.Tensor]:
    return {name: unpack_mask(layer.mask, layer.in_features) for name, layer in packed_layers(model).items()}


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)])
@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16), ("t5", torch.float32)])
def test_a_pruned_model_keeps_its_support_and_gets_better(name, dtype, pattern):
    model, reference = pruned(name, pattern, dtype), tiny.build(name, dtype)
    before, dense, expected = tiny.snapshot(model), tiny.snapshot(reference), supports(model)
    sparsity = str(pattern) if isinstance(pattern, NM) else pattern.sparsity
    result = refine(model, config(sparsity=sparsity, rank=0), reference=reference)
    assert tiny.same(before, tiny.snapshot(model)) and tiny.same(dense, tiny.snapshot(reference))
    found = masks(result)
    assert found.keys() == expected.keys()
    for key, mask in found.items():
        assert torch.equal(mask, expected[key]) and pattern.allows(mask)
    layers = packed_layers(result)
    assert all((layer.rank, layer.values.dtype) == (0, dtype) for layer in layers.values())
    changed = [
        not torch.equal(unpack(layer.mask, layer.values, layer.in_features), weight_of(model.get_submodule(key)))
        for key, layer in layers.items()
    ]
    assert all(changed)
    for row in result.sparselr_report.blocks:
        assert 0 < row["tm"]["loss_after"] < row["tm"]["loss_before"]
    assert {row["pattern"] for row in result.sparselr_report.layers} == {str(pattern)}
    errors = [(tiny.logits(each) - tiny.logits(reference)).square().sum() for each in (model, result)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("target", ["block", "stream", "mean"])
@torch.no_grad()
def test_targets_and_errors_are_the_references(target):
    """The same as `compress`, were its solver to return the pruned weights."""
    model, reference = pruned("llama", NM(2, 4)), tiny.build("llama")
    with torch.no_grad():
        reference.model.embed_tokens.weight.mul_(1.5)  # its stream starts elsewhere
        reference.model.layers[0].input_layernorm.weight.mul_(1.1)
    result = refine(model, config({**TM, "target": target}), reference=reference)
    rows = {row["name"]: row for row in result.sparselr_report.layers}
    name = "model.layers.0.self_attn.q_proj"
    inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(tiny.IDS)).flatten(0, 1)
    dense, sparse = (inputs @ each.get_submodule(name).weight.T for each in (reference, model))
    expected = (dense - sparse).square().sum() / dense.square().sum()
    assert rows[name]["relative_error"] == pytest.approx(float(expected), rel=1e-4)

    stream, own = reference.model.embed_tokens(tiny.IDS), model.model.embed_tokens(tiny.IDS)
    outputs = {}
    for key, block, hidden in (
        ("block", reference.model.layers[0], own),
        ("stream", reference.model.layers[0], stream),
        ("start", model.model.layers[0], own),
    ):
        embeddings = reference.model.rotary_emb(hidden, torch.arange(32)[None])
        mask = torch.ones(32, 32).tril().log()[None, None]
        outputs[key] = block(hidden, attention_mask=mask, position_embeddings=embeddings).detach()
    outputs["mean"] = (outputs["block"] + outputs["stream"]) / 2
    loss = (outputs["start"] - outputs[target]).square().mean()
    assert result.sparselr_report.blocks[0]["tm"]["loss_before"] == pytest.approx(float(loss), rel=1e-4)


def test_norms_biases_and_what_stays_dense_are_the_models_own():
    model, reference = pruned("opt", Unstructured(0.5)), tiny.build("opt")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "embed" in name or "fc2" in name:
                parameter.mul_(1.25)
    result = refine(model, config(STILL, ignore=["fc2"]), reference=reference)
    torch.testing.assert_close(tiny.logits(result), tiny.logits(model), atol=1e-5, rtol=1e-5)
    assert tiny.logits(result).sub(tiny.logits(reference)).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"k_proj|c_attn": 2}}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pair_starts_where_it_is(name, changes):
    base = pruned(name, NM(2, 4))
    pair, reference = with_lora(base, **changes), tiny.build(name)
    before, expected = tiny.snapshot(pair), tiny.logits(pair)
    result = refine(pair, config(STILL), reference=reference)
    assert tiny.same(before, tiny.snapshot(pair)) and isinstance(pair, PeftModel)
    torch.testing.assert_close(tiny.logits(result), expected, atol=1e-5, rtol=1e-5)
    assert len(packed_layers(result)) == len(linear_layers(tiny.build(name)))
    for key, layer in packed_layers(result).items():
        small = "rank_pattern" in changes and key.endswith(("k_proj", "c_attn"))
        assert layer.rank == (2 if small else 4)
        assert NM(2, 4).allows(unpack_mask(layer.mask, layer.in_features))


def test_a_pair_is_refined():
    reference, pair = (
        tiny.build("llama"),
        with_lora(pruned("llama", NM(2, 4)), target_modules=["q_proj", "down_proj"]),
    )
    with torch.no_grad():
        for name, parameter in pair.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    result = refine(pair, config(sparsity="2:4"), reference=reference)
    ranks = {name: layer.rank for name, layer in packed_layers(result).items()}
    assert all(rank == (4 if name.endswith(("q_proj", "down_proj")) else 0) for name, rank in ranks.items())
    layer, lora = (each.get_submodule("model.layers.0.self_attn.q_proj") for each in (result, pair.get_base_model()))
    start = lora.lora_B["default"].weight @ lora.lora_A["default"].weight * lora.scaling["default"]
    assert not torch.equal(layer.B @ layer.A, start)
    assert torch.allclose(layer.B @ layer.A, start, atol=0.05)
    errors = [(tiny.logits(each) - tiny.logits(reference)).square().sum() for each in (pair, result)]
    assert errors[1] < errors[0]


def test_several_active_adapters_are_joined():
    pair = with_lora(pruned("llama", NM(2, 4)), target_modules=["q_proj"])
    pair.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    pair.base_model.set_adapter(["default", "second"])
    expected = tiny.logits(pair)
    result = refine(pair, config(STILL), reference=tiny.build("llama"))
    torch.testing.assert_close(tiny.logits(result), expected, atol=1e-5, rtol=1e-5)
    layers = packed_layers(result)
    assert layers["model.layers.0.self_attn.q_proj"].rank == 7
    assert layers["model.layers.0.self_attn.k_proj"].rank == 3


def test_saved_modules_come_along():
    pair = with_lora(pruned("llama", NM(2, 4)), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        pair.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    expected = tiny.logits(pair)
    result = refine(pair, config(STILL), reference=tiny.build("llama"))
    torch.testing.assert_close(tiny.logits(result), expected, atol=1e-5, rtol=1e-5)


def test_distillation_uses_the_reference():
    model, reference = pruned("llama", NM(2, 4)), tiny.build("llama")
    before, dense, expected = tiny.snapshot(model), tiny.snapshot(reference), supports(model)
    options = {"passes": 3, "batch_size": 2, "lr": 1e-3, "precision": "fp32", "self_samples": 0}
    result = refine(model, config(refine="distill", distill=options), reference=reference)
    stats = result.sparselr_report.distill
    log = torch.log_softmax(torch.stack([tiny.logits(reference), tiny.logits(model)]), -1)
    divergence = (log[0].exp() * (log[0] - log[1])).sum(-1).mean()
    assert stats["loss_before"] == pytest.approx(float(divergence), rel=1e-3)
    assert stats["loss_after"] < stats["loss_before"]
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(result).items())
    assert tiny.same(before, tiny.snapshot(model)) and tiny.same(dense, tiny.snapshot(reference))


def test_the_same_seed_gives_the_same_bits():
    results = [refine(pruned("llama", NM(2, 4)), config(), reference=tiny.build("llama")) for _ in range(2)]
    assert tiny.same(*map(tiny.snapshot, results))


# -- what is recorded


def test_settings_are_recorded_as_found(tmp_path):
    pair = with_lora(pruned("llama", Unstructured(0.7)), target_modules=["q_proj"])
    refine(pair, config(), tmp_path, reference=tiny.build("llama"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["method"], stored["method_options"], stored["rank"]) == (PRECOMPUTED, {}, 4)
    kept = sum(int(mask.sum()) for mask in masks(loaded).values())
    size = sum(mask.numel() for mask in masks(loaded).values())
    assert stored["sparsity"] == pytest.approx(1 - kept / size) == pytest.approx(0.7, abs=1e-3)
    report = Report.load(tmp_path)
    assert {row["pattern"] for row in report.layers if "down_proj" in row["name"]} == {"0.699951"}  # 1433 of 2048
    assert {row["rank"] for row in report.layers} == {0, 4}
    assert "a decomposition made elsewhere" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="method='precomputed' marks decompositions that were made elsewhere"):
        compress(tiny.build("llama"), tiny.settings(method=PRECOMPUTED, method_options=None))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """dense, base (2:4) and adapter, as directories."""
    home = tmp_path_factory.mktemp("refine")
    tiny.build("llama", torch.bfloat16).save_pretrained(home / "dense")
    base = pruned("llama", NM(2, 4), torch.bfloat16)
    base.save_pretrained(home / "base")
    with_lora(base).save_pretrained(home / "adapter")
    return home


def test_by_name(home, tmp_path):
    fields = {"sparsity": "2:4", "rank": 4}
    result = refine(
        str(home / "base"),
        config(STILL, **fields),
        tmp_path,
        reference=home / "dense",
        adapter=home / "adapter",
    )
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.bfloat16)
    pair = PeftModel.from_pretrained(base, home / "adapter")
    found, expected = tiny.logits(result).float(), tiny.logits(pair).float()
    assert (found - expected).norm() < 0.03 * expected.norm()  # roundings of BF16
    assert result.sparselr_report.base_model == str(home / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(result))
    assert loaded.config.quantization_config.sparsity == "2:4"


def test_the_model_writes_its_own_calibration_data():
    model, reference = pruned("llama", NM(2, 4)), tiny.build("llama", vocab_size=4096)
    with torch.no_grad():
        model = tiny.build("llama", vocab_size=4096)
        for layer in linear_layers(model).values():
            layer.weight.copy_(project(layer.weight, NM(2, 4))[0])
    fields = {"calibration": "self", "num_samples": 2, "seq_len": 16, "tokenizer": tiny.tokenizer()}
    result = refine(model, config(**fields), reference=reference)
    assert result.config.quantization_config.calibration == "self"
    assert torch.isfinite(tiny.logits(result)).all()


# -- errors


def one_too_many(model):
    model.model.layers[1].mlp.down_proj.weight.data[0, :4] = 1.0
    return model


ERRORS = [
    (
        lambda: pruned("llama", NM(2, 4)),
        {},
        {"reference": None},
        "reference=None: refinement matches the dense",
    ),
    (lambda: pruned("llama", NM(2, 4)), {"refine": None}, {}, "refine=None leaves nothing to do"),
    (
        lambda: pruned("llama", NM(2, 4)),
        {"compression": 0.5},
        {},
        "compression=0.5 chooses sparsity and rank",
    ),
    (
        lambda: pruned("llama", NM(2, 4)),
        {"sparsity": 0.5, "allocation": "owl"},
        {},
        "allocation='owl' chooses",
    ),
    (
        lambda: one_too_many(pruned("llama", NM(2, 4))),
        {"sparsity": "2:4"},
        {},
        r"^model\.layers\.1\.mlp\.down_proj: its 102\d nonzeros of 2048 do not obey sparsity='2:4'",
    ),
    (
        lambda: pruned("llama", Unstructured(0.5)),
        {"overrides": {"q_proj": {"sparsity": 0.6}}},
        {},
        r"layers\.0\.self_attn\.q_proj: its 512 nonzeros of 1024 do not obey sparsity='0.6'",
    ),
    (
        lambda: with_lora(pruned("llama", NM(2, 4))),
        {"rank": 8},
        {},
        r"layers\.0\.self_attn\.q_proj: rank=8 was asked for, but its adapter has rank 4",
    ),
    (
        lambda: with_lora(pruned("llama", NM(2, 4))),
        {"ignore": ["q_proj"]},
        {},
        r"^model\.layers\.0\.self_attn\.q_proj has an adapter, but is no layer that is compressed",
    ),
    (
        lambda: with_lora(pruned("llama", NM(2, 4)), target_modules=["q_proj", "lm_head"]),
        {},
        {},
        "^lm_head has an adapter, but is no layer that is compressed",
    ),
    (
        lambda: with_lora(pruned("llama", NM(2, 4)), use_dora=True),
        {},
        {},
        r"q_proj: adapter 'default' cannot become B and A",
    ),
    (
        lambda: with_lora(pruned("llama", NM(2, 4)), lora_bias=True),
        {},
        {},
        r"q_proj: adapter 'default' cannot become B and A",
    ),
    (
        lambda: get_peft_model(pruned("llama", NM(2, 4)), VeraConfig(target_modules=["q_proj"], r=4)),
        {},
        {},
        "model has adapters of type .*VERA: expected LoRA",
    ),
    (
        lambda: compress(tiny.build("llama"), tiny.settings()),
        {},
        {},
        r"model='' is already quantised \(sparselr\): expected dense weights",
    ),
    (
        lambda: pruned("llama", NM(2, 4)),
        {},
        {"reference": tiny.build("llama", intermediate_size=96)},
        r"reference='' is not the dense model: model\.layers\.0\.mlp\.gate_proj is \(64, 32\) in the model, \(96, 32\)",
    ),
    (
        lambda: pruned("llama", NM(2, 4)),
        {},
        {"reference": with_lora(tiny.build("llama"))},
        "reference='' has adapters loaded into it: pass the dense model",
    ),
    (lambda: pruned("llama", NM(2, 4)), {}, {"adapter": "a"}, "adapter='a' goes with a model given by name"),
    (lambda: pruned("llama", NM(2, 4)), {"targets": ["query"]}, {}, "targets: 'query' matches no layer"),
]


@pytest.mark.parametrize(("model", "changes", "arguments", "message"), ERRORS)
def test_errors(model, changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        refine(model(), config(**changes), **{"reference": tiny.build("llama"), **arguments})


def test_a_merged_adapter_is_refused():
    pair = with_lora(pruned("llama", NM(2, 4)))
    pair.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: its adapter is merged into the weight"):
        refine(pair, config(), reference=tiny.build("llama"))


def test_a_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"config={'rank': 4}: expected a hf_sparselr\.SparseLRConfig"):
        refine(tiny.build("llama"), {"rank": 4}, reference=tiny.build("llama"))


def test_layers_are_chosen_as_in_compress():
    model, changes = (
        pruned("llama", NM(2, 4)),
        {"targets": ["mlp.*"], "overrides": {"up_proj": {"skip": True}}},
    )
    result = refine(model, config(**changes), reference=tiny.build("llama"))
    assert packed_layers(result).keys() == plan_layers(model, tiny.settings(**changes)).keys()
