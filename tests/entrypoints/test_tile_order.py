"""Models whose layers lie in the order of tiles: what users do with them comes out as in the order of rows."""

import copy

import accelerate
import pytest
import torch
from helpers import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_sparselr
from hf_sparselr.kernels.tile_order import fits_tiles
from hf_sparselr.nn import linear
from hf_sparselr.nn.linear import packed_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny.build("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    path = tmp_path_factory.mktemp("packed")
    hf_sparselr.compress(model, tiny.settings(sparsity=0.5)).save_pretrained(path)
    return path


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.fixture
def pair(folder, monkeypatch):
    """A model in rows and one whose layers its loading put into tiles, as a GPU would."""
    plain = load(folder)
    monkeypatch.setattr(linear, "may_suit_tiles", lambda weight: fits_tiles(weight.out_features, weight.in_features))
    tiled = load(folder)
    assert all(layer.is_tiled for layer in packed_layers(tiled).values())
    monkeypatch.setattr(linear, "may_suit_tiles", lambda weight: not weight.A.requires_grad)
    return plain, tiled


def is_tiled(model) -> bool:
    return all(layer.is_tiled for layer in packed_layers(model).values())


def assert_same(plain, tiled) -> None:
    with torch.no_grad():
        for _ in range(3):  # in groups from the second on
            torch.testing.assert_close(tiny.logits(tiled), tiny.logits(plain))


def test_logits_and_text(pair) -> None:
    plain, tiled = pair
    assert_same(plain, tiled)
    texts = [model.generate(tiny.IDS[:2, :8], max_new_tokens=8, do_sample=False) for model in pair]
    assert torch.equal(*texts) and is_tiled(tiled)


def test_the_first_call_decides_where_loading_did_not(folder, pair) -> None:
    plain, _ = pair
    model = copy.deepcopy(plain)
    assert not is_tiled(model)
    assert_same(plain, model)
    assert is_tiled(model)
    assert not any(layer.is_tiled for layer in packed_layers(copy.deepcopy(model)).values())


def test_saved_as_it_was_loaded(pair, folder, tmp_path) -> None:
    _, tiled = pair
    tiled.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert tiny.same(before, after)
    assert_same(load(tmp_path), tiled)


def test_moved(pair) -> None:
    plain, tiled = pair
    assert_same(plain.to(torch.bfloat16), tiled.to(torch.bfloat16))
    assert_same(plain.to(torch.float32), tiled.to(torch.float32))


def test_dense_again(pair) -> None:
    plain, tiled = pair
    assert_same(plain.dequantize(), tiled.dequantize())


def test_an_adapter(pair) -> None:
    plain, tiled = pair
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = get_peft_model(plain, config)
    torch.manual_seed(0)
    tiled = get_peft_model(tiled, config)
    grads = []
    for model in (plain, tiled):
        model(tiny.IDS).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert_same(plain, tiled)
    assert is_tiled(tiled)
    plain.merge_adapter(), tiled.merge_adapter()
    assert_same(plain, tiled)
    plain.unmerge_adapter(), tiled.unmerge_adapter()
    assert is_tiled(tiled)
    assert_same(plain.merge_and_unload(), tiled.merge_and_unload())


@pytest.mark.parametrize("mode", ["factors", "full"])
def test_training(pair, mode: str) -> None:
    losses = []
    for model in pair:
        trained = hf_sparselr.train_mode(model, mode)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            loss = model(input_ids=tiny.IDS, labels=tiny.IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        del trained, optimizer
    torch.testing.assert_close(*losses)
    assert_same(*pair)


def test_compiled(pair) -> None:
    plain, tiled = pair
    compiled = torch.compile(tiled, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tiny.IDS).logits, plain(tiny.IDS).logits)
        assert is_tiled(tiled)
        _ = packed_layers(tiled)["model.layers.0.self_attn.q_proj"].values
        torch.testing.assert_close(compiled(tiny.IDS).logits, plain(tiny.IDS).logits)


def test_offloaded(pair) -> None:
    plain, tiled = pair
    accelerate.cpu_offload(tiled, torch.device("cpu"))
    assert_same(plain, tiled)


def test_experts_stay_in_rows(monkeypatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16}
    model = hf_sparselr.compress(tiny.build("qwen3-moe", **sizes), tiny.settings(sparsity=0.5))
    before = tiny.logits(model)
    monkeypatch.setattr(linear, "may_suit_tiles", lambda weight: True)
    torch.testing.assert_close(tiny.logits(model), before)
    assert {name for name, layer in packed_layers(model).items() if layer.is_tiled} == {
        name for name in packed_layers(model) if "experts" not in name
    }
