"""Served layers on a GPU: the operator for every way of computing it, and CUDA graphs captured without a first run."""

import pytest
import torch
from helpers.engine import Engine, feed, packed_layer
from torch.nn import functional as F

from hf_sparselr.integrations.serving.shards import PackedShards

pytestmark = pytest.mark.gpu

INPUTS, SIZES = 512, {"q": 512, "k": 128, "v": 128}


@pytest.fixture(params=["2:4", 0.5])
def served(request):
    """Merged layers in BF16 as on one rank, their bias, and what they stand for."""
    parts = {
        name: packed_layer(size, INPUTS, rank, request.param, size)
        for (name, size), rank in zip(SIZES.items(), (16, 0, 8), strict=True)
    }
    shape = (sum(SIZES.values()), INPUTS)
    engine = Engine(0, SIZES)
    shards = PackedShards("qkv_proj", shape, INPUTS, engine.load, torch.bfloat16, torch.device("cuda"))
    for name, part in parts.items():
        feed(shards, part, name)
    bias = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)
    shards.finish(bias)
    return shards, bias, torch.cat([(part.weight + 0).cuda() for part in parts.values()])


def check(out, x, weight, bias):
    expected = F.linear(x.float(), weight, bias.float())
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 24, 100, 300, 2048])
@torch.inference_mode()
def test_every_number_of_rows(served, rows):
    shards, bias, weight = served
    x = torch.randn(rows, INPUTS, device="cuda", dtype=torch.bfloat16)
    check(shards(x, bias), x, weight, bias)


@pytest.mark.parametrize("rows", [1, 5, 16, 24, 200, 512])
@torch.inference_mode()
def test_graphs_are_captured_at_once(served, rows):
    shards, bias, weight = served
    x = torch.randn(rows, INPUTS, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = shards(x, bias)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        check(out, x, weight, bias)


@torch.inference_mode()
def test_compiled_without_a_graph_break(served):
    shards, bias, weight = served
    compiled = torch.compile(shards, fullgraph=True, dynamic=True)
    for rows in (3, 40):
        x = torch.randn(rows, INPUTS, device="cuda", dtype=torch.bfloat16)
        check(compiled(x, bias), x, weight, bias)


@torch.inference_mode()
def test_row_parallel_outputs_add_up():
    packed, total = packed_layer(256, INPUTS, 16, "2:4"), 0
    x = torch.randn(4, INPUTS, device="cuda", dtype=torch.bfloat16)
    for rank in range(2):
        engine = Engine(rank, None)
        shape = (256, INPUTS // 2)
        shards = PackedShards("down", shape, INPUTS, engine.load, torch.bfloat16, torch.device("cuda"))
        feed(shards, packed)
        shards.finish()
        total = total + shards(x[:, rank * shape[1] :][:, : shape[1]].contiguous()).float()
    expected = F.linear(x.float(), (packed.weight + 0).cuda())
    assert (total - expected).norm() < 0.02 * expected.norm()
