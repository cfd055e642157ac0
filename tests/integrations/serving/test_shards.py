"""What the engines' plugins share, without an engine: slices on all ranks against the full layers."""

import logging

import pytest
import torch
from helpers.engine import Engine, feed, packed_layer, tensors
from torch.nn import functional as F

from hf_sparselr.format.checkpoint import FormatError
from hf_sparselr.integrations.serving.shards import PackedShards

INPUTS, HEAD, HEADS, GROUPS = 24, 8, 4, 2  # 24 inputs do not fill mask words
CPU = torch.device("cpu")


def layer(outs, **kwargs):
    return packed_layer(outs, INPUTS, **kwargs)


def dense(packed):
    return packed.weight + 0


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("fused", [False, True])
def test_merged_columns_on_every_rank(world, fused):
    """q, k, v by heads; with four ranks and two groups, keys and values are on two ranks each."""
    replicas = max(1, world // GROUPS)
    parts = {"q": (HEADS, 4), "k": (GROUPS, 0), "v": (GROUPS, 2)}
    whole = {name: layer(heads * HEAD, rank=rank, seed=len(name)) for name, (heads, rank) in parts.items()}
    merged = layer((HEADS + 2 * GROUPS) * HEAD, rank=3, pattern="2:4", seed=7)
    full = {name: dense(packed) for name, packed in whole.items()}
    if fused:
        full = dict(zip(full, dense(merged).split([len(weight) for weight in full.values()]), strict=True))
    x = torch.randn(3, INPUTS)
    for rank in range(world):
        sizes = {"q": HEADS * HEAD // world, "k": GROUPS * HEAD * replicas // world}
        sizes["v"] = sizes["k"]
        engine = Engine(rank, sizes, {"k": replicas, "v": replicas}, world)
        shards = PackedShards("qkv_proj", (sum(sizes.values()), INPUTS), INPUTS, engine.load, torch.float32, CPU)
        if fused:
            feed(shards, merged)
        else:
            for name in ("v", "q", "k"):  # in any order
                feed(shards, whole[name], name)
        shards.finish()
        kept = []
        for name, weight in full.items():
            first = rank // (1 if name == "q" else replicas) * sizes[name]
            kept.append(weight[first : first + sizes[name]])
        bias = torch.randn(sum(sizes.values()))
        expected = F.linear(x, torch.cat(kept), bias)
        torch.testing.assert_close(shards(x, bias), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rank", [0, 4])
def test_row_parallel_outputs_add_up(world, rank):
    packed, x = layer(10, rank=rank), torch.randn(3, INPUTS)
    total, width = 0, INPUTS // world
    for place in range(world):
        shards = PackedShards("down", (10, width), INPUTS, Engine(place, None).load, torch.float32, CPU)
        feed(shards, packed)
        shards.finish()
        total = total + shards(x[:, place * width : (place + 1) * width].contiguous())
    torch.testing.assert_close(total, F.linear(x, dense(packed)), atol=1e-5, rtol=1e-5)


def test_a_dense_layer_among_packed_ones(caplog):
    gate, up = layer(8), torch.randn(8, INPUTS)
    shards = PackedShards("gate_up", (16, INPUTS), INPUTS, Engine(0, {0: 8, 1: 8}).load, torch.float32, CPU)
    feed(shards, gate, 0)
    with caplog.at_level(logging.WARNING):
        shards.load("weight", up, 1)
    assert "gate_up (1) is dense" in caplog.text
    shards.finish()
    x = torch.randn(2, INPUTS)
    torch.testing.assert_close(shards(x), F.linear(x, torch.cat([dense(gate), up])), atol=1e-5, rtol=1e-5)


def plain(dtype=torch.float32):
    return PackedShards("mlp.up", (8, INPUTS), INPUTS, Engine(0, None).load, dtype, CPU)


def test_values_in_the_dtype_of_the_engine_and_in_memory_of_their_own():
    packed, shards = layer(8), plain(torch.bfloat16)
    feed(shards, packed)
    shards.finish()
    assert {p.dtype for p in shards.parameters()} == {torch.bfloat16, torch.uint8}
    files = {tensor.untyped_storage().data_ptr() for tensor in tensors(packed).values()}
    assert not files & {p.untyped_storage().data_ptr() for p in shards.parameters()}
    assert shards(torch.randn(2, INPUTS, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("values"), "lacks its mask and values"),
        (lambda parts: parts.pop("A"), "lacks its A"),
        (
            lambda parts: parts.update(values=parts["values"][1:]),
            r"keeps \d+ values, for 24 inputs and \d+ values",
        ),
        (lambda parts: parts.update(mask=parts["mask"][:, 1:]), "a mask of 2 bytes a row"),
        (lambda parts: parts.update(A=parts["A"][:, 1:]), "A has 23 columns, expected 24"),
        (lambda parts: parts.clear(), r"holds 0 of its 8 rows \(loaded: nothing\)"),
    ],
)
def test_incomplete_layers_are_named(change, message):
    parts, shards = tensors(layer(8)), plain()
    change(parts)
    with pytest.raises(FormatError, match=rf"^mlp\.up: .*{message}"):
        for part, tensor in parts.items():
            shards.load(part, tensor)
        shards.finish()


def test_compiled_without_a_graph_break():
    packed, shards = layer(8), plain()
    feed(shards, packed)
    shards.finish()
    compiled = torch.compile(shards, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, INPUTS)
    with torch.inference_mode():
        assert torch.equal(compiled(x), shards(x))


def test_the_operator_keeps_to_the_rules_of_torch():
    shards = plain()
    feed(shards, layer(8))
    shards.finish()
    arguments = (torch.randn(2, INPUTS), *shards.tensors(), torch.randn(8), INPUTS)
    torch.library.opcheck(torch.ops.hf_sparselr.merged_linear.default, arguments)
