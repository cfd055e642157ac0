"""Compressed experts through the other verbs: refine, export, train_mode, inspect, dtypes, shards, generation."""

import copy

import pytest
import torch
from helpers import tiny

import hf_sparselr
from hf_sparselr import compress, export_portable, refine, train_mode
from hf_sparselr.compression.experts import compressible_layers
from hf_sparselr.entrypoints.inspect import inspect_checkpoint
from hf_sparselr.format.bitmask import unpack_mask
from hf_sparselr.format.patterns import NM, project
from hf_sparselr.nn.linear import packed_layers

TM = {"passes": 3, "batch_size": 4, "lr": 3e-4}


@torch.no_grad()
def pruned(name: str):
    model = tiny.build(name)
    for layer in compressible_layers(model).values():
        layer.weight.copy_(project(layer.weight, NM(2, 4))[0])
    return model


def test_a_pruned_mixture_is_refined():
    model, reference = pruned("mixtral"), tiny.build("mixtral")
    before, dense = tiny.snapshot(model), tiny.snapshot(reference)
    supports = {name: layer.weight != 0 for name, layer in compressible_layers(model).items()}
    config = hf_sparselr.SparseLRConfig(
        calibration=tiny.IDS, num_samples=4, seq_len=32, refine="tm", tm=TM, sparsity="2:4", rank=0
    )
    result = refine(model, config, reference=reference)
    assert tiny.same(before, tiny.snapshot(model)) and tiny.same(dense, tiny.snapshot(reference))
    found = {name: unpack_mask(layer.mask, layer.in_features) for name, layer in packed_layers(result).items()}
    assert found.keys() == supports.keys() and sum("experts" in name for name in found) == 16
    assert all(torch.equal(found[name], supports[name]) for name in found)
    assert all(row["tm"]["loss_after"] < row["tm"]["loss_before"] for row in result.sparselr_report.blocks)


def test_an_export_of_experts_is_refused_before_anything_is_written(tmp_path):
    model = compress(tiny.build("mixtral"), tiny.settings())
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj.*one parameter.*dequantize\(\)"):
        export_portable(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["factors", "full"])
def test_experts_train(mode):
    model = train_mode(compress(tiny.build("qwen3-moe"), tiny.settings()), mode)
    before, start = tiny.snapshot(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tiny.IDS, labels=tiny.IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("experts.down_proj" in name and name.endswith(".B") for name in moved)
    assert any("experts" in name and name.endswith(".values") for name in moved) == (mode == "full")
    assert tiny.same(before, tiny.snapshot(start))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reloading_is_exact_in_every_dtype_and_in_shards(tmp_path, dtype):
    model = compress(tiny.build("qwen3-moe", dtype), tiny.settings())
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    assert {layer.values.dtype for layer in packed_layers(again).values()} == {dtype}
    assert torch.equal(tiny.logits(model), tiny.logits(again))
    mask = torch.ones_like(tiny.IDS)
    mask[:2, :5] = 0  # padding on the left
    outputs = [
        each.generate(tiny.IDS, attention_mask=mask, max_new_tokens=4, do_sample=False) for each in (model, again)
    ]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_a_batch_gives_what_its_rows_give():
    model = compress(tiny.build("mixtral"), tiny.settings())
    together = model(input_ids=tiny.IDS).logits
    alone = torch.cat([model(input_ids=row[None]).logits for row in tiny.IDS])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(input_ids=tiny.IDS).logits, together, atol=1e-4, rtol=1e-4)


def test_inspect_counts_experts(tmp_path):
    model = compress(tiny.build("mixtral"), tiny.settings(), tmp_path)
    inspection = inspect_checkpoint(tmp_path)
    assert str(inspection).count("experts.down_proj") >= 1
    assert model.sparselr_report.layers and all(
        0 <= row["share"] <= 1 for row in model.sparselr_report.layers if "tokens" in row
    )


def test_other_implementations_are_refused_before_the_work(tmp_path):
    compress(tiny.build("mixtral"), tiny.settings(), tmp_path)
    model = tiny.build("mixtral")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match=r'experts_implementation="sonicmoe".*"grouped_mm"'):
        compress(model, tiny.settings())
    with pytest.raises(ValueError, match=r'experts_implementation="sonicmoe".*"grouped_mm"'):
        type(model).from_pretrained(tmp_path, experts_implementation="sonicmoe")
