"""The products of all experts in one launch, on a GPU, against products of single experts in FP64."""

import copy

import pytest
import torch
from compression.test_experts_families import FAMILIES, build
from helpers.kernel_cases import assert_near
from torch import nn

from hf_sparselr.bench.experts import random_experts
from hf_sparselr.bench.kernels import random_layer
from hf_sparselr.compression.experts import unfuse, weights_of_experts
from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.format.patterns import parse
from hf_sparselr.integrations.transformers.experts_forward import install, run
from hf_sparselr.kernels.cuda import experts as cuda
from hf_sparselr.nn.linear import SparseLRLinear
from hf_sparselr.nn.packed_experts import ExpertStack

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
EXPERTS = 5
COUNTS = [[0, 1, 0, 2, 0], [7, 0, 40, 20, 3], [0, 300, 1, 64, 35]]  # rows of each expert
SHAPES = [  # out, in, pattern, rank, bias
    (192, 256, "2:4", 16, False),
    (520, 512, "2:4", 20, True),
    (200, 320, "2:4", 0, True),
    (96, 128, "0.5", 8, False),
    (96, 200, "0.7", 6, True),
    (64, 136, "4:8", 0, False),
]


def layers_of(
    out: int, ins: int, pattern: str, rank: int, bias: bool, dtype: torch.dtype, ranks: tuple[int, ...] = ()
) -> list[SparseLRLinear]:
    ranks = ranks or (rank,) * EXPERTS
    pattern = parse(pattern if ":" in pattern else float(pattern))
    layers = [random_layer((out, ins), pattern, r, dtype, DEVICE, seed=expert) for expert, r in enumerate(ranks)]
    for layer in layers if bias else ():
        layer.bias = nn.Parameter(torch.randn(out, device=DEVICE, dtype=dtype), requires_grad=False)
    return layers


def expected(layers: list[SparseLRLinear], x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, expert in zip(x.double(), ids.tolist(), strict=True):
        dense = layers[expert].to_dense()
        bias = 0 if dense.bias is None else dense.bias.double()
        rows.append(dense.weight.double() @ row + bias)
    return torch.stack(rows)


def rows_for(counts: list[int], ins: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, the expert of each row, the ends of the experts' rows."""
    ids = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts)).to(DEVICE)
    x = torch.randn(len(ids), ins, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    return x, ids, torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "ins", "pattern", "rank", "bias"), SHAPES)
def test_rows_in_order(out, ins, pattern, rank, bias, dtype, counts) -> None:
    layers = layers_of(out, ins, pattern, rank, bias, dtype)
    x, ids, ends = rows_for(counts, ins, dtype)
    stack = ExpertStack(layers, (EXPERTS, out, ins))
    assert stack.table(x) is not None
    assert_near(stack.multiply(x, ends), expected(layers, x, ids), dtype)


CONFIGS = [
    cuda.Config(tiles=1, ahead=4), cuda.Config(tiles=2, warps=4, ahead=1, resident=6),
    cuda.Config(tiles=4, ahead=1, resident=2), cuda.PAIRS_32, cuda.PAIRS_64, cuda.PAIRS_128,
    cuda.Config(resident=1, ahead=1, samples=128, parts=4, across=2),
    cuda.Config(unpack=True),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("counts", COUNTS)
def test_every_configuration(config, counts) -> None:
    layers = layers_of(520, 512, "2:4", 0, not config.unpack, torch.bfloat16, ranks=(4, 16, 20, 8, 64))
    table = cuda.ExpertTable([layer.packed_weight for layer in layers])
    x, ids, ends = rows_for(counts, 512, torch.bfloat16)
    for by_row in (False, True):
        assert_near(table.bind(config, by_row)(x, ends), expected(layers, x, ids), torch.bfloat16)


@pytest.mark.parametrize("config", CONFIGS[3:])
def test_rows_of_any_width(config) -> None:
    layers = layers_of(71, 192, "2:4", 0, False, torch.bfloat16)
    table = cuda.ExpertTable([layer.packed_weight for layer in layers])
    x, ids, ends = rows_for(COUNTS[2], 192, torch.bfloat16)
    assert_near(table.bind(config)(x, ends), expected(layers, x, ids), torch.bfloat16)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [1, 7, 300, 900])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
@torch.no_grad()
def test_a_module_in_a_graph(implementation, tokens, pattern) -> None:
    install()
    packed, dense = random_experts((8, 2, 128, 192), parse(pattern), 16, torch.bfloat16, DEVICE)
    packed.config._experts_implementation = implementation
    dense.config = copy.copy(dense.config)
    dense.config._experts_implementation = "eager"
    x = torch.randn(tokens, 128, device=DEVICE, dtype=torch.bfloat16)
    index = torch.rand(tokens, 8).topk(2).indices.to(DEVICE)
    weights = torch.rand(tokens, 2, device=DEVICE, dtype=torch.bfloat16)
    first = packed(x, index, weights)
    assert torch.equal(run(packed, x, index, weights), first)
    reference = dense.double()(x.double(), index, weights.double())
    assert (first.double() - reference).norm() <= 0.02 * reference.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(x, index, weights)
    index.copy_(torch.rand(tokens, 8).topk(2).indices)  # other experts, and other numbers of rows
    graph.replay()
    reference = dense(x.double(), index, weights.double())
    assert (y.double() - reference).norm() <= 0.02 * reference.norm()


@torch.no_grad()
def test_the_host_does_not_wait() -> None:
    install()
    packed, _ = random_experts((8, 2, 128, 192), parse("2:4"), 16, torch.bfloat16, DEVICE)
    for tokens in (1, 300):
        x = torch.randn(tokens, 128, device=DEVICE, dtype=torch.bfloat16)
        index = torch.rand(tokens, 8).topk(2).indices.to(DEVICE)
        weights = torch.rand(tokens, 2, device=DEVICE, dtype=torch.bfloat16)
        packed(x, index, weights)
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed(x, index, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_gradients_on_the_gpu() -> None:
    packed, dense = random_experts((4, 2, 64, 128), parse("2:4"), 8, torch.float32, DEVICE)
    for parameter in [*packed.parameters(), *dense.parameters()]:
        parameter.requires_grad_(parameter.is_floating_point())
    index = torch.rand(40, 4).topk(2).indices.to(DEVICE)
    given = [torch.randn(40, 64, device=DEVICE).requires_grad_(), index, torch.rand(40, 2, device=DEVICE)]
    gradients = []
    for module in (packed, dense):
        given[0].grad = None
        module(*given).square().sum().backward()
        gradients.append(given[0].grad)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    for layer, gradient in zip(packed.down_proj, dense.down_proj.grad, strict=True):
        torch.testing.assert_close(layer.B.grad, gradient @ layer.A.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "mixtral"])
@torch.no_grad()
def test_modules_of_other_kinds(name) -> None:
    """With biases and an interleaved gate, without a gate, plain: the same as transformers' own loop."""
    for cls_name in FAMILIES[name]:
        experts = build(name, cls_name).to(DEVICE, torch.bfloat16)
        for key, count in weights_of_experts(experts).items():
            unfuse(experts, key, count)
            stack = getattr(experts, key)
            for expert, layer in enumerate(stack):
                weight = layer.weight.detach()
                mask = parse("2:4").mask(weight.abs())
                A, B = torch.randn(4, weight.shape[1]).to(weight), torch.randn(weight.shape[0], 4).to(weight) * 0.1
                stack.add_module(
                    str(expert), SparseLRLinear.from_decomposition(Decomposition(weight * mask, mask, A, B))
                )
        for tokens in (1, 9):
            x = torch.randn(tokens, next(iter(stack)).out_features, device=DEVICE, dtype=torch.bfloat16)
            index = torch.rand(tokens, count).topk(2).indices.to(DEVICE)
            weights = torch.rand(tokens, 2, device=DEVICE, dtype=torch.bfloat16)
            expected = experts(x, index, weights)  # by the module's own loop
            actual = run(experts, x, index, weights)
            assert (actual.float() - expected.float()).norm() <= 0.03 * expected.float().norm()


@torch.no_grad()
def test_edits_and_moves_are_seen() -> None:
    layers = layers_of(96, 128, "2:4", 8, False, torch.bfloat16)
    x, ids, ends = rows_for([1, 1, 0, 2, 0], 128, torch.bfloat16)
    stack = ExpertStack(layers, (EXPERTS, 96, 128))
    stack.multiply(x, ends)
    layers[3].values.mul_(2)
    layers[1].A.data = torch.zeros_like(layers[1].A)
    y = stack.multiply(x, ends)
    assert_near(y, expected(layers, x, ids), torch.bfloat16)
