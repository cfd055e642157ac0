"""A model with hierarchical low-rank parts: made, saved, loaded, inspected, trained, adapted."""

import json

import pytest
import torch
from helpers import tiny
from helpers.hub_server import HubServer, run_client
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import hf_sparselr
from hf_sparselr.entrypoints.inspect import inspect_checkpoint
from hf_sparselr.format.checkpoint import FormatError
from hf_sparselr.nn.linear import packed_layers

HIERARCHY = {"depth": 2, "smallest_leaf": 4}
Q = "model.layers.0.self_attn.q_proj"


def settings(**changes):
    return tiny.settings(**{"low_rank": "hss", "hierarchy": HIERARCHY, **changes})


def compressed(name: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    return hf_sparselr.compress(tiny.build(name, dtype), settings(**changes))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    model = compressed(sparsity=0.8)
    model.save_pretrained(path)
    return path, tiny.logits(model), tiny.snapshot(model)


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


# -- making, saving, loading


@pytest.mark.parametrize(
    ("changes", "zeros"),
    [
        ({}, 0.5),
        ({"sparsity": 0.7}, 0.7),
        ({"method": "svd", "sparsity": None, "method_options": None}, 1.0),
        ({"method": "shss", "low_rank": None, "method_options": None}, 0.5),
    ],
    ids=["2:4", "unstructured", "no S", "shss"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_form_reloads_to_the_bit(name: str, changes: dict, zeros: float, tmp_path) -> None:
    model = compressed(name, **changes)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert tiny.same(tiny.snapshot(again), tiny.snapshot(model))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    for layer in packed_layers(again).values():
        assert layer.rank == 0 and layer.hierarchy.shape.depth in (1, 2)
        assert layer.values.numel() / layer.weight.numel() == pytest.approx(1 - zeros, abs=0.01)
    dense = again.dequantize()
    torch.testing.assert_close(tiny.logits(dense), tiny.logits(model), atol=1e-4, rtol=1e-4)


def test_half_precision_and_compression_while_loading(tmp_path) -> None:
    tiny.build("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=settings())
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert tiny.same(tiny.snapshot(again), tiny.snapshot(model))
    assert packed_layers(again)[Q].hierarchy.leaves.dtype == torch.bfloat16
    assert load(tmp_path / "packed", dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_classes_without_a_head_and_shards_read_it(packed, tmp_path) -> None:
    load(packed[0]).save_pretrained(tmp_path, max_shard_size="20KB")
    body = AutoModel.from_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    hidden = body(input_ids=tiny.IDS)[0]
    torch.testing.assert_close(load(tmp_path).lm_head(hidden), packed[1])


OVER_THE_HUB = """
import torch
from transformers import AutoModelForCausalLM
here = AutoModelForCausalLM.from_pretrained({folder!r})
here.push_to_hub("me/hss")
there = AutoModelForCausalLM.from_pretrained("me/hss").state_dict()
print(all(torch.equal(there[name], tensor) for name, tensor in here.state_dict().items()), len(there))
"""


def test_it_goes_over_the_hub(packed, tmp_path) -> None:
    folder = packed[0]
    with HubServer() as hub:
        out = run_client(hub, tmp_path, OVER_THE_HUB.format(folder=str(folder)))
        assert out.split() == ["True", str(len(load(folder).state_dict()))]
        assert b"B A is hierarchical" in hub.repos["me/hss"]["README.md"]


def test_a_hierarchy_that_is_lost_or_split_otherwise_is_refused(packed, tmp_path) -> None:
    load(packed[0]).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["hierarchy"]["depth"] = 1
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match=r"hierarchy.ranks says \[4, 2\], but the config says \[4\]"):
        load(tmp_path)


def test_depth_zero_is_the_flat_form_to_the_bit() -> None:
    flat = hf_sparselr.compress(tiny.build("llama"), tiny.settings())
    model = compressed(hierarchy={"depth": 0})
    assert tiny.same(tiny.snapshot(model), tiny.snapshot(flat))


def test_the_report_counts_what_the_file_holds(packed) -> None:
    path = packed[0]
    inspection = inspect_checkpoint(path)
    tensors = load_file(path / "model.safetensors")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    for row in inspection.layers:
        assert row["bytes"] == sum(size for name, size in sizes.items() if name.startswith(f"{row['name']}."))
        assert row["ranks"] == [4, 2] and not row["permuted"]
    assert inspection.totals["model"]["packed"] == sum(sizes.values())
    report = json.loads((path / "sparselr_report.json").read_text())
    assert report["sizes"]["packed"] == sum(sizes.values())
    assert all(row["ranks"] == [4, 2] for row in report["layers"])
    assert "hierarchical" in (path / "README.md").read_text() and "4/2" in str(inspection)


def test_a_hierarchy_belongs_to_its_packed_layer() -> None:
    found = compressed(targets=["q_proj", "mlp"]).sparselr_report.coverage
    assert {name.rsplit(".", 1)[1] for name in found["dense"]} == {"k_proj", "v_proj", "o_proj"}


def test_a_corrupt_permutation_is_refused_by_name(tmp_path) -> None:
    model = compressed()
    for layer in packed_layers(model).values():
        for part, size in (("row_order", layer.out_features), ("column_order", layer.in_features)):
            order = nn.Parameter(torch.arange(size, dtype=torch.int32), requires_grad=False)
            setattr(layer.hierarchy, part, order)
    before = tiny.logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(tiny.logits(load(tmp_path)), before)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.hierarchy.row_order"][0] = 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"{Q}.hierarchy.row_order is no permutation"):
        load(tmp_path)


def test_layers_too_small_for_the_ranks_are_named_before_work() -> None:
    with pytest.raises(ValueError, match=r"k_proj: rank 8 must be smaller.*lower the rank or the depth"):
        compressed(rank=8, calibration=tiny.IDS)
    model = compressed(rank=8, on_incompatible="skip")
    assert {name.rpartition(".")[2] for name in packed_layers(model)} == {
        "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_pruned_models_are_refined_with_flat_factors_only() -> None:
    with pytest.raises(ValueError, match=r"low_rank='hss'.*expected 'flat'"):
        hf_sparselr.refine(tiny.build("llama"), settings(refine="tm"), reference=tiny.build("llama"))


# -- training


def test_matching_and_distillation_train_the_hierarchy(packed) -> None:
    model = compressed(
        sparsity=0.8,
        refine="tm+distill",
        tm={"passes": 2, "batch_size": 4},
        distill={"passes": 2, "batch_size": 4, "self_samples": 0},
    )
    report, before = model.sparselr_report, packed[2]
    assert all(row["tm"]["loss_after"] < row["tm"]["loss_before"] for row in report.blocks)
    assert report.distill["loss_after"] < report.distill["loss_before"]
    layer = packed_layers(model)[Q]
    assert torch.equal(layer.mask, before[f"{Q}.mask"])
    for part in ("A", "B", "leaves"):
        assert not torch.equal(getattr(layer.hierarchy, part), before[f"{Q}.hierarchy.{part}"])


def test_distillation_of_the_factors_alone_leaves_s(packed) -> None:
    model = compressed(
        sparsity=0.8,
        refine="distill",
        distill={"passes": 2, "batch_size": 4, "self_samples": 0, "train": "factors"},
    )
    layer, before = packed_layers(model)[Q], packed[2]
    assert torch.equal(layer.values, before[f"{Q}.values"])
    assert not torch.equal(layer.hierarchy.leaves, before[f"{Q}.hierarchy.leaves"])


@pytest.mark.parametrize("mode", ["factors", "factors+norms", "full"])
def test_train_mode_trains_factors_and_leaves(packed, mode: str, tmp_path) -> None:
    model = hf_sparselr.train_mode(load(packed[0]), mode)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    hierarchical = {f"{Q}.hierarchy.{part}" for part in ("A", "B", "leaves")}
    assert hierarchical <= trained and f"{Q}.hierarchy.ranks" not in trained
    assert (f"{Q}.values" in trained) == (mode == "full")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tiny.IDS, labels=tiny.IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(model.get_parameter(name), packed[2][name]) for name in hierarchical)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(load(tmp_path)), tiny.logits(model))


# -- adapters


def test_the_hierarchy_is_no_pair_of_factors(packed, tmp_path) -> None:
    model = load(packed[0])
    for verb in (hf_sparselr.lora_config, lambda m: hf_sparselr.export_portable(m, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"hierarchical.*low_rank='flat'"):
            verb(model)


def test_additive_lora_beside_it_trains_and_merges_exactly(packed, tmp_path) -> None:
    path, logits, _ = packed
    model = get_peft_model(load(path), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    torch.testing.assert_close(tiny.logits(model.get_base_model()), logits)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted = tiny.logits(model.get_base_model())
    assert not torch.allclose(adapted, logits, atol=1e-3)
    with pytest.raises(ValueError, match=r"rank='own'.*hierarchical"):
        hf_sparselr.merge_and_unload(model, rank="own")
    merged = hf_sparselr.merge_and_unload(model)
    torch.testing.assert_close(tiny.logits(merged), adapted, atol=1e-5, rtol=1e-5)
    assert packed_layers(merged)[Q].rank == 3
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(merged))
    # The merged factors are a genuine pair beside the hierarchy: they are an adapter, it stays.
    replaced = get_peft_model(again, hf_sparselr.lora_config(again))
    torch.testing.assert_close(tiny.logits(replaced.get_base_model()), tiny.logits(merged))
