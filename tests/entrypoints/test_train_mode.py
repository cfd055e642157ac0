"""What trains in each mode, through loops, Trainer and accelerate, and what is saved afterwards."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from helpers import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparselr
from hf_sparselr.format.bitmask import unpack, unpack_mask
from hf_sparselr.format.patterns import parse
from hf_sparselr.kernels import resident
from hf_sparselr.nn.linear import SparseLRLinear, packed_layers

MODES = ("factors", "factors+norms", "full")
IDS = tiny.IDS


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    settings = tiny.settings(overrides={"layers.0.self_attn.v_proj": {"rank": 0}})
    hf_sparselr.compress(tiny.build("qwen2"), settings).save_pretrained(folder)  # qwen2 has biases
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def supports(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.mask.clone() for name, layer in packed_layers(model).items()}


def train(model: nn.Module, steps: int = 6, lr: float = 5e-3) -> tuple[list[float], torch.optim.Optimizer]:
    """A plain loop; the optimizer gets every parameter, the masks too."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- what is chosen


def expected(model: nn.Module, mode: str) -> set[str]:
    parameters = dict(model.named_parameters())
    leaves = {name: name.rpartition(".")[2] for name in parameters}
    factors = {name for name, leaf in leaves.items() if leaf in ("A", "B")}
    vectors = {n for n, p in parameters.items() if p.ndim == 1 and leaves[n] != "values"}
    floats = {name for name, leaf in leaves.items() if leaf != "mask"}
    return {"factors": factors, "factors+norms": factors | vectors, "full": floats}[mode]


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_exactly_its_parameters(packed: Path, mode: str) -> None:
    model = load(packed)
    assert hf_sparselr.train_mode(model, mode) is model
    names = expected(model, mode)
    assert trainable(model) == names
    assert ("model.layers.0.self_attn.q_proj.bias" in names) == (mode != "factors")
    assert ("model.embed_tokens.weight" in names) == (mode == "full")
    before, masks = tiny.snapshot(model), supports(model)
    losses, optimizer = train(model)
    assert losses[-1] < losses[0] - 0.02
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name
        state = optimizer.state.get(parameter, {})
        assert ("exp_avg" in state) == (name in names)
        assert "exp_avg" not in state or state["exp_avg"].shape == parameter.shape
    for name, layer in packed_layers(model).items():
        assert layer.mask.grad is None and layer.mask.dtype == torch.uint8
        assert torch.equal(layer.mask, masks[name])
        assert layer.values.shape == (layer.in_features * layer.out_features // 2,)
        assert parse("2:4").allows(unpack(layer.mask, layer.values, layer.in_features) != 0)


def test_modes_can_be_switched(packed: Path) -> None:
    model = load(packed)
    for mode in ("full", "factors", "factors+norms", "factors"):
        assert trainable(hf_sparselr.train_mode(model, mode)) == expected(model, mode)


def test_the_gradient_of_the_nonzeros_is_the_dense_one_on_the_support(packed: Path) -> None:
    model = hf_sparselr.train_mode(load(packed, torch.float64), "full")
    dense = copy.deepcopy(model)
    for name, layer in packed_layers(model).items():
        dense.set_submodule(name, layer.to_dense().requires_grad_(True))
    got, want = gradients(model), gradients(dense)
    for name, layer in packed_layers(model).items():
        weight = want[f"{name}.weight"]
        support = unpack_mask(layer.mask, layer.in_features)
        assert weight[~support].any()
        torch.testing.assert_close(got[f"{name}.values"], weight[support])
        if layer.rank:
            torch.testing.assert_close(got[f"{name}.A"], layer.B.T @ weight)
            torch.testing.assert_close(got[f"{name}.B"], weight @ layer.A.T)
    torch.testing.assert_close(got["model.embed_tokens.weight"], want["model.embed_tokens.weight"])


def test_errors(packed: Path) -> None:
    model = load(packed)
    with pytest.raises(ValueError, match="mode='all': expected one of 'factors', 'factors\\+norms', 'full'"):
        hf_sparselr.train_mode(model, "all")
    with pytest.raises(ValueError, match="holds no compressed layer"):
        hf_sparselr.train_mode(tiny.build("llama"))
    bare = nn.Sequential(SparseLRLinear(4, 4, 8, rank=0))
    with pytest.raises(ValueError, match="mode='factors' selects no parameter: the compressed layers have rank 0"):
        hf_sparselr.train_mode(bare)
    assert trainable(hf_sparselr.train_mode(bare, "full")) == {"0.values"}


def test_zero3_is_refused(packed: Path) -> None:
    pytest.importorskip("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig

    model = load(packed)
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # counts while it is referenced
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 is not supported for packed layers"):
        hf_sparselr.train_mode(model)
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 is not supported for packed layers"):
        model.hf_quantizer.is_trainable  # noqa: B018 (which Trainer asks for)
    del config
    hf_sparselr.train_mode(model)


@pytest.mark.parametrize(("installed", "works"), [("2.11.0+cu128", False), ("2.12.0", True), ("2.13.1+cpu", True)])
def test_fsdp2_needs_a_torch_that_shards_integers(
    packed: Path, accelerator: Accelerator, monkeypatch, installed: str, works: bool
) -> None:
    model = load(packed)
    # as on GPUs: accelerate leaves the CPU to DDP
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    plugin = AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    monkeypatch.setattr(torch, "__version__", TorchVersion(installed))
    if works:
        hf_sparselr.train_mode(model)
        return
    with pytest.raises(ValueError, match=r"torch 2\.11\.0\+cu128: FSDP2 .* needs torch >= 2\.12; use DDP"):
        hf_sparselr.train_mode(model)
    plugin.fsdp_version = 1
    with pytest.raises(ValueError, match=r"FSDP1 is not supported .* FSDP2 \(fsdp_version=2, torch >= 2\.12\)"):
        hf_sparselr.train_mode(model)


# --- with adapters


def test_on_a_peft_model_the_replacing_adapter_trains(packed: Path) -> None:
    model = hf_sparselr.as_peft_model(load(packed))
    model.add_adapter("more", LoraConfig(target_modules=["up_proj"]))
    model.requires_grad_(False)
    hf_sparselr.train_mode(model)
    factors = {n for n, _ in model.named_parameters() if ".lora_" in n and ".default." in n}
    assert trainable(model) == factors != set()
    model.base_model.set_adapter(["default", "more"])
    assert trainable(hf_sparselr.train_mode(model)) == factors


def test_what_adapter_files_could_not_hold_is_refused(packed: Path) -> None:
    model = hf_sparselr.as_peft_model(load(packed))
    before = trainable(model)
    for mode in ("factors+norms", "full"):
        with pytest.raises(ValueError, match=r"adapter files hold the adapters alone.*unload"):
            hf_sparselr.train_mode(model, mode)
    assert trainable(model) == before
    additive = get_peft_model(load(packed), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="no active adapter replaces"):
        hf_sparselr.train_mode(additive)


def test_merged_factors_train_on_in_full(packed: Path) -> None:
    model = hf_sparselr.as_peft_model(load(packed))
    train(model)
    merged = hf_sparselr.train_mode(model.merge_and_unload(), "full")
    assert trainable(merged) == expected(merged, "full")
    losses, _ = train(merged)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
@pytest.mark.parametrize("rows", [1, 40])
def test_every_way_of_computing_follows_training(packed: Path, kernel: str, rows: int) -> None:
    model = hf_sparselr.train_mode(load(packed), "full")
    layer = model.model.layers[1].mlp.up_proj
    layer.kernel = kernel
    x = torch.randn(rows, layer.in_features)
    for _ in range(3):
        with torch.no_grad():
            weight = unpack(layer.mask, layer.values, layer.in_features) + layer.B @ layer.A
            torch.testing.assert_close(layer(x), x @ weight.T)
        train(model, steps=1)


@pytest.mark.parametrize("adapter", [False, True])
def test_dense_layers_in_memory_do_not_pile_up_in_training(packed: Path, adapter: bool) -> None:
    model = load(packed)
    layers = packed_layers(model)
    for layer in layers.values():
        layer.kernel = "dense"
    model = hf_sparselr.as_peft_model(model) if adapter else hf_sparselr.train_mode(model)
    before = len(resident._RESIDENT)
    for _ in range(3):
        train(model, steps=1)
        tiny.logits(model.eval())
    assert len(resident._RESIDENT) == before + len(layers)


# --- casts, checkpointing, autocast


def test_the_mask_survives_every_cast(packed: Path) -> None:
    for mode in MODES:
        model = hf_sparselr.train_mode(load(packed), mode)
        masks = supports(model)
        casts = [lambda m: m.to(torch.bfloat16), lambda m: nn.Module.half(m), lambda m: nn.Module.float(m)]
        for cast in [*casts, lambda m: m.to(torch.float64)]:
            cast(model)
            names = expected(model, mode)
            for name, layer in packed_layers(model).items():
                assert layer.mask.dtype == torch.uint8 and torch.equal(layer.mask, masks[name])
                assert not layer.mask.requires_grad
                assert layer.dtype == layer.values.dtype == model.dtype
            assert trainable(model) == names
        train(model, steps=1)
        state = copy.deepcopy(model.state_dict())
        fresh = load(packed, torch.float64)
        fresh.load_state_dict(state)
        assert tiny.same(fresh.state_dict(), state)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["factors", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(packed: Path, mode: str, reentrant: bool) -> None:
    model = hf_sparselr.train_mode(load(packed), mode).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys() == trainable(model)
    for name in plain:  # the pass that keeps no activations rounds as inference does
        torch.testing.assert_close(plain[name], checkpointed[name])


@pytest.mark.parametrize("mode", ["factors", "full"])
def test_autocast_keeps_gradients_in_fp32(packed: Path, mode: str) -> None:
    model = hf_sparselr.train_mode(load(packed), mode)
    exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model)
    assert exact.keys() == rounded.keys()
    for name in exact:
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - exact[name]).norm() <= 0.05 * exact[name].norm(), name


# --- Trainer and accelerate


def arguments(folder: Path, **changes) -> TrainingArguments:
    fields = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**fields, **changes})


def data() -> list[dict]:
    return [{"input_ids": ids, "labels": ids} for ids in IDS]


def test_trainer_wants_a_mode_before_it_takes_a_bare_model(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    with pytest.raises(ValueError, match=r"hf_sparselr\.train_mode.*hf_sparselr\.lora_config"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=data())
    Trainer(model=hf_sparselr.train_mode(model), args=arguments(tmp_path), train_dataset=data())


def test_trainer_takes_adapters_however_they_were_added(packed: Path, tmp_path: Path) -> None:
    inside = load(packed)
    inside.add_adapter(hf_sparselr.lora_config(inside))
    for model in (inside, hf_sparselr.as_peft_model(load(packed))):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=data()).train()


@pytest.mark.parametrize("mode", MODES)
def test_trainer_trains_saves_and_reloads_packed(packed: Path, tmp_path: Path, mode: str) -> None:
    model = hf_sparselr.train_mode(load(packed), mode)
    before, masks = tiny.snapshot(model), supports(model)
    options = arguments(tmp_path, bf16=mode == "full", gradient_checkpointing=mode != "full")
    trainer = Trainer(model=model, args=options, train_dataset=data())
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == expected(model, mode)
    trainer.save_model(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert tiny.same(loaded.state_dict(), model.state_dict())
    assert tiny.same(supports(loaded), masks)


def test_trainer_trains_the_adapter_of_the_factors(packed: Path, tmp_path: Path) -> None:
    model = hf_sparselr.as_peft_model(load(packed))
    before = tiny.snapshot(model)
    options = arguments(tmp_path, bf16=True, gradient_checkpointing=True)
    trainer = Trainer(model=model, args=options, train_dataset=data())
    trainer.train()
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == trainable(model)
    trainer.save_model(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("model*"))
    loaded = PeftModel.from_pretrained(load(packed), tmp_path / "saved")
    assert tiny.same(loaded.state_dict(), after)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_trainer_resumes(packed: Path, tmp_path: Path, kind: str) -> None:
    def trainer(**changes) -> Trainer:
        model = load(packed)
        model = hf_sparselr.as_peft_model(model) if kind == "adapter" else hf_sparselr.train_mode(model, kind)
        return Trainer(model=model, args=arguments(tmp_path, **changes), train_dataset=data())

    whole = trainer(save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.same(resumed.model.state_dict(), whole.model.state_dict())


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)  # Trainer leaves its own
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_trains_in_mixed_precision(packed: Path, accelerator: Accelerator) -> None:
    model = hf_sparselr.train_mode(load(packed), "full").train()
    masks = supports(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(6):
        loss = prepared(input_ids=IDS, labels=IDS).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert tiny.same(supports(accelerator.unwrap_model(prepared)), masks)


def test_save_pretrained_writes_the_state_dict_it_is_given(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] += 1
    model.save_pretrained(tmp_path, state_dict=state)
    assert tiny.same(load(tmp_path).state_dict(), state)
    assert model.hf_quantizer.given_state is None
