import json
import math
from contextlib import contextmanager

import pytest
import torch
from helpers import tiny
from helpers.early_errors import EARLY_ERRORS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from hf_sparselr import compress
from hf_sparselr.compression import layer_inputs as worker
from hf_sparselr.compression import pipeline
from hf_sparselr.compression.model_structure import find_stacks
from hf_sparselr.compression.plan import plan_layers
from hf_sparselr.compression.report import Report
from hf_sparselr.data.model_inputs import make_batches, token_samples
from hf_sparselr.format.bitmask import unpack_mask
from hf_sparselr.format.patterns import parse
from hf_sparselr.nn.linear import packed_layers
from hf_sparselr.solvers.threebasil.method import Options
from hf_sparselr.utils.precision import matmuls

TM = {"refine": "tm", "tm": {"passes": 2, "batch_size": 4, "lr": 3e-4, "relative_lr": False}}
ROW = {"name", "shape", "pattern", "rank", "sparsity", "relative_error", "seconds", "iterations"}
IGNORED = {"mamba": {"ignore": ["dt_proj"]}}  # Mamba reads its weight and never calls it


def mask_of(layer):
    return unpack_mask(layer.mask, layer.in_features)


@pytest.mark.parametrize("sparsity", ["2:4", "1:8", 0.37])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        ("opt", torch.bfloat16),
        ("qwen2", torch.float32),
        ("gemma3", torch.bfloat16),
        ("t5", torch.float32),
        ("t5", torch.bfloat16),
        ("mamba", torch.float32),
    ],
)
def test_every_family_end_to_end(name, dtype, sparsity):
    model = tiny.build(name, dtype)
    config = tiny.settings(sparsity=sparsity, **IGNORED.get(name, {}), **TM)
    plan = plan_layers(model, config)
    blocks = [name for members in find_stacks(model).values() for name in members]
    assert compress(model, config) is model
    layers, report = packed_layers(model), model.sparselr_report
    assert layers.keys() == plan.keys()
    for layer in layers.values():
        kept = mask_of(layer)
        assert parse(sparsity).allows(kept) and kept.sum() == parse(sparsity).kept(kept.shape)
        assert (layer.dtype, layer.values.dtype, layer.A.dtype, layer.rank) == (dtype, dtype, dtype, 4)
    assert torch.isfinite(tiny.logits(model)).all() and tiny.logits(model).dtype == dtype
    assert sorted(row["name"] for row in report.layers) == sorted(plan)
    assert all(row.keys() >= ROW and 0 < row["relative_error"] < 1 for row in report.layers)
    assert [row["name"] for row in report.blocks] == blocks
    assert all(0 < row["tm"]["loss_after"] <= row["tm"]["loss_before"] for row in report.blocks)
    assert all(row["tm"]["passes"] == 2 for row in report.blocks)
    assert report.sizes["packed"] < report.sizes["dense"]
    assert report.settings == config.to_dict()
    json.dumps(vars(report))


@pytest.mark.parametrize("refine", [{}, TM])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2", "gemma2", "gemma3", "phi3", "neox", "bert", "t5"])
def test_nothing_is_lost_without_sparsity(name, refine):
    model = tiny.build(name)
    dense = tiny.logits(model)
    compress(model, tiny.settings(sparsity=0.0, rank=0, **refine))
    assert len(packed_layers(model)) >= 8
    torch.testing.assert_close(tiny.logits(model), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_dequantize_gives_back_the_layers_it_replaced(name):
    model = tiny.build(name)
    types = {key: type(module) for key, module in model.named_modules()}
    compress(model, tiny.settings())
    packed = tiny.logits(model)
    shapes = {key: layer.weight.shape for key, layer in packed_layers(model).items()}
    dense = model.dequantize()
    assert {key: type(module) for key, module in dense.named_modules()} == types
    assert not packed_layers(dense)
    assert all(dense.get_submodule(key).weight.shape == shape for key, shape in shapes.items())
    assert (Conv1D in types.values()) == (name == "gpt2")
    torch.testing.assert_close(tiny.logits(dense), packed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("llama", 2 * 4), ("gpt2", 2 * 4), ("t5", 2 * 4 + 2 * 7)])
def test_layers_with_one_input_share_one_gram_matrix(name, expected, monkeypatch):
    made = []

    class Counted(worker.GramAccumulator):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(worker, "GramAccumulator", Counted)
    compress(tiny.build(name), tiny.settings())
    assert len(made) == expected
    assert all(gram.rows == tiny.IDS.numel() for gram in made)


@pytest.mark.parametrize("refine", [{}, TM])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_batch_size_changes_nothing(name, refine):
    # One iteration, not rounded: in a long search the smallest rounding can tip two nearly equal weights.
    solver = {"min_iterations": 1, "max_iterations": 1, "refit_rounds": 0, "precision": "fp32"}
    config = {"method_options": solver, **refine}
    models = [compress(tiny.build(name), tiny.settings(batch_size=size, **config)) for size in (1, 2, 4)]
    reference = tiny.logits(models[-1])
    for model in models[:2]:
        torch.testing.assert_close(tiny.logits(model), reference, atol=1e-4, rtol=1e-3)


def block_outputs(model, replaced=()):
    """Outputs of the two blocks; `replaced` are put in the place of the first ones."""
    outputs = []

    def hook(module, args, out):
        index = len(outputs)
        first = out[0] if isinstance(out, tuple) else out
        outputs.append(replaced[index] if index < len(replaced) else first)
        return (outputs[-1], *out[1:]) if isinstance(out, tuple) else outputs[-1]

    handles = [block.register_forward_hook(hook) for block in next(iter(find_stacks(model).values())).values()]
    tiny.logits(model)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("target", ["block", "stream", "mean"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_matching_targets_by_hand(name, target):
    still = {"passes": 1, "lr": 1e-12, "target": target, "precision": "fp32"}  # as good as no step
    model, dense = tiny.build(name), tiny.build(name)
    compress(model, tiny.settings(refine="tm", tm=still))
    found = [row["tm"]["loss_before"] for row in model.sparselr_report.blocks]
    ours, stream = block_outputs(model), block_outputs(dense)
    own = [
        stream[0],
        block_outputs(dense, ours[:1])[1],
    ]  # of the dense blocks on the compressed blocks' outputs
    targets = {
        "block": own,
        "stream": stream,
        "mean": [(a + b) / 2 for a, b in zip(own, stream, strict=True)],
    }
    expected = [float((a - b).square().mean()) for a, b in zip(ours, targets[target], strict=True)]
    assert found == pytest.approx(expected, rel=1e-3)


def test_targets_differ_after_the_first_block_alone():
    losses = {}
    for target in ("block", "stream", "mean"):
        config = tiny.settings(refine="tm", tm={"passes": 2, "target": target})
        rows = compress(tiny.build("llama"), config).sparselr_report.blocks
        losses[target] = [row["tm"]["loss_after"] for row in rows]
        assert all(row["tm"]["loss_after"] < row["tm"]["loss_before"] for row in rows)
    first, second = zip(*losses.values(), strict=True)
    assert len(set(first)) == 1 and len(set(second)) == 3


def test_published_effort_is_the_published_options(tmp_path):
    solver = Options(form="textbook", refit_rounds=1, precision="fp32", max_iterations=100)
    tm = {"passes": 20, "lr": 2e-5, "relative_lr": False, "final_lr": 0.2, "batch_size": 8, "target": "block"}
    tm["precision"] = "fp32"
    short = {"effort": "published", "noisy_windows": None, "method_options": {"max_iterations": 100}}
    compress(tiny.build("llama"), tiny.settings(refine="tm", **short), tmp_path / "a")
    compress(tiny.build("llama"), tiny.settings(refine="tm", method_options=solver, tm=tm), tmp_path / "b")
    compress(
        tiny.build("llama"),
        tiny.settings(refine="tm", method_options={"max_iterations": 100}),
        tmp_path / "c",
    )
    stored = [(tmp_path / run / "model.safetensors").read_bytes() for run in "abc"]
    assert stored[0] == stored[1] != stored[2]


def test_what_the_user_set_for_products_does_not_matter():
    config = tiny.settings(refine="tm", tm={"passes": 1, "precision": "fp32"})
    expected = tiny.snapshot(compress(tiny.build("llama"), config))
    with matmuls("medium"):  # BF16 on CPUs that have it
        assert tiny.same(tiny.snapshot(compress(tiny.build("llama"), config)), expected)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
    ],
)
def test_modes_of_the_caller_do_not_matter(mode):
    config = tiny.settings(refine="tm+distill", tm={"passes": 1}, distill={"passes": 1, "self_samples": 0})
    plain, other = tiny.build("llama"), tiny.build("llama")
    compress(plain, config)
    with mode():
        compress(other, config)
    assert tiny.same(tiny.snapshot(other), tiny.snapshot(plain))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    assert torch.get_default_dtype() is dtype
    torch.set_default_dtype(before)


def test_blocks_tell_their_phases():
    report = compress(tiny.build("llama"), tiny.settings(**TM)).sparselr_report
    for row in report.blocks:
        expected = {"propagation", "capture and Gram", "factorisation", "ADMM", "refit", "solve", "TM"}
        assert row["phases"].keys() == expected and row["peaks"] == {}
        solve = sum(row["phases"][name] for name in ("factorisation", "ADMM", "refit"))
        assert solve <= row["phases"]["solve"] <= row["seconds"] <= report.seconds


def test_windows_of_different_lengths_are_never_padded():
    model = tiny.build("llama")
    windows = [tiny.IDS[0], tiny.IDS[1, :20], tiny.IDS[2, :20], tiny.IDS[3, :7]]
    assert [tuple(b["input_ids"].shape) for b in make_batches(token_samples(windows), 8)] == [
        (1, 32),
        (2, 20),
        (1, 7),
    ]
    compress(model, tiny.settings(calibration=windows))
    assert torch.isfinite(tiny.logits(model)).all()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for run in ("a", "b"):
        compress(tiny.build("llama", torch.bfloat16), tiny.settings(**TM), output_dir=tmp_path / run)
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    compress(tiny.build("llama", torch.bfloat16), tiny.settings(seed=1), output_dir=tmp_path / "c")
    assert (tmp_path / "c" / names[0]).read_bytes() != (tmp_path / "a" / names[0]).read_bytes()


@pytest.mark.parametrize("sparsity", ["2:4", 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_on_disk(dtype, sparsity, tmp_path):
    model = compress(tiny.build("llama", dtype), tiny.settings(sparsity=sparsity), output_dir=tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in packed_layers(model).items():
        stored = sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}."))
        size = layer.in_features * layer.out_features
        floats = parse(sparsity).kept((layer.out_features, layer.in_features))
        floats += layer.rank * (layer.in_features + layer.out_features)
        assert stored == pytest.approx(floats * dtype.itemsize + size / 8, rel=0.01)
    dense = sum(t.nbytes for t in tensors.values())
    assert model.sparselr_report.sizes["packed"] == pytest.approx(dense, rel=0.01)


# --- errors, and what they leave behind --------------------------------------------------------------------


def nan_weight(model):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan


def nan_inputs(model):
    model.model.layers[1].post_attention_layernorm.weight.data[3] = math.inf


def raising_forward(model):
    model.model.layers[1].forward = lambda *args, **kwargs: 1 / 0


def state_of(model):
    """Everything a run may disturb, besides the bits of the weights."""
    return (
        [(name, id(module), module.training, *vars(module)) for name, module in model.named_modules()],
        [(name, id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()],
        model.config.to_dict(),
        sorted(vars(model)),
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (nan_weight, ValueError, r"^model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"),
        (nan_inputs, ValueError, r"^model\.layers\.1\.mlp\.gate_proj: .* NaN or Inf"),
        (raising_forward, ZeroDivisionError, "division"),
    ],
)
def test_a_failed_run_leaves_the_model_dense_and_unchanged(spoil, error, message, dtype, training):
    model = tiny.build("llama", dtype).train(training)
    model.model.embed_tokens.requires_grad_(False)
    spoil(model)
    weights, state = tiny.snapshot(model), state_of(model)
    with pytest.raises(error, match=message):
        compress(model, tiny.settings(**TM))
    assert state_of(model) == state
    assert tiny.same(weights, tiny.snapshot(model))


def test_a_raising_sink_leaves_the_model_dense():
    model = tiny.build("llama")
    weights, state = tiny.snapshot(model), state_of(model)
    config = tiny.settings()
    with pytest.raises(ZeroDivisionError):
        pipeline.run(model, plan_layers(model, config), config, token_samples(tiny.IDS), lambda *_: 1 / 0)
    assert state_of(model) == state and tiny.same(weights, tiny.snapshot(model))


def test_a_compressed_model_is_in_eval_mode_and_frozen_as_before():
    model = tiny.build("opt").train()
    model.model.decoder.embed_tokens.requires_grad_(False)
    model.config.use_cache = True
    compress(model, tiny.settings(**TM))
    assert not any(module.training for module in model.modules())
    assert model.config.use_cache and torch.is_grad_enabled()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    payload = {f"{n}.{p}" for n, layer in packed_layers(model).items() for p, _ in layer.named_parameters()}
    assert frozen == payload | {"model.decoder.embed_tokens.weight"}


def test_an_already_compressed_model_is_refused(tmp_path):
    model = compress(tiny.build("llama"), tiny.settings(), output_dir=tmp_path)
    for again in (model, tmp_path):
        with pytest.raises(ValueError, match=r"is already quantised \(sparselr\)"):
            compress(again, tiny.settings())


def test_a_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"config={'rank': 4}: expected a hf_sparselr\.SparseLRConfig"):
        compress(tiny.build("llama"), {"rank": 4})


# --- by name -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A dense checkpoint with all that may lie beside one."""
    path = tmp_path_factory.mktemp("dense")
    model = tiny.build("llama", torch.bfloat16, vocab_size=4096)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_compress_by_name_writes_a_complete_checkpoint(checkpoint, tmp_path):
    model = compress(str(checkpoint), tiny.settings(), output_dir=tmp_path)
    assert model.dtype == torch.bfloat16 and len(packed_layers(model)) == 14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert loaded.generation_config.max_new_tokens == 7
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (checkpoint, tmp_path)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template is not None
    report = Report.load(tmp_path)
    assert len(report.layers) == 14 and report.sizes["packed"] < report.sizes["dense"]
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored.items() >= {"quant_method": "sparselr", "format_version": 1, "calibration": "custom"}.items()


def test_load_arguments_reach_from_pretrained(checkpoint):
    assert compress(checkpoint, tiny.settings(), dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("given", ["name", "object"])
def test_the_model_can_write_its_own_calibration_data(checkpoint, given):
    config = tiny.settings(calibration="self", num_samples=2, seq_len=16)
    model = checkpoint if given == "name" else AutoModelForCausalLM.from_pretrained(checkpoint)
    model = compress(model, config)
    assert model.config.quantization_config.calibration == "self"
    assert len(packed_layers(model)) == 14 and torch.isfinite(tiny.logits(model)).all()


@pytest.fixture(params=["missing", "corrupt"])
def unreadable(request, checkpoint, tmp_path):
    """A checkpoint whose weights cannot be read."""
    for file in checkpoint.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if request.param == "corrupt":
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    return tmp_path


@pytest.mark.parametrize(("changes", "message"), EARLY_ERRORS)
def test_errors_come_before_the_weights_are_read(changes, message, unreadable):
    with pytest.raises(ValueError, match=message):
        compress(unreadable, tiny.settings(**changes))
