"""The packed product against float64, on whatever this machine has: compiled on a GPU, else by Triton's interpreter
(see conftest)."""

import argparse
import copy
import importlib.util
import json
import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.bench import kernels as bench
from hf_sparselr.kernels import native, ops, packed_linear, resident
from hf_sparselr.kernels.index import build_index, index_of, row_starts
from hf_sparselr.modules import SparseLRLinear
from hf_sparselr.packing import pack
from hf_sparselr.patterns import parse
from hf_sparselr.solvers import Decomposition

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
needs_native = pytest.mark.skipif(not native.supports(torch.float32), reason="needs AVX2 and a C compiler")

# (out, in, sparsity or support): odd sizes, exact and inexact N:M, extreme supports
SUPPORTS = [
    (9, 100, 0.5), (1, 64, 0.7), (5, 3, 0.5), (7, 130, 0.9), (6, 257, 0.6), (16, 256, "2:4"), (5, 320, "2:4"),
    (4, 100, "2:4"), (6, 192, "4:8"), (6, 128, "1:4"), (4, 96, "empty"), (3, 70, "full"), (5, 128, "empty rows"),
    (2, 576, "short groups"),
]  # fmt: skip


@dataclass
class Problem:
    """S + B A packed, and as float64 `dense`."""

    mask: torch.Tensor
    values: torch.Tensor
    A: torch.Tensor | None
    B: torch.Tensor | None
    bias: torch.Tensor | None
    S: torch.Tensor
    support: torch.Tensor

    @property
    def dense(self) -> torch.Tensor:
        return self.S if self.A is None else self.S + self.B.double() @ self.A.double()

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.double(), self.dense, None if self.bias is None else self.bias.double())

    @property
    def packed(self) -> tuple:
        return self.mask, self.values, self.A, self.B


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def choose_support(out: int, n: int, kind: str | float) -> torch.Tensor:
    scores = draw(out, n, seed=1).abs()
    if isinstance(kind, float) or ":" in kind:
        return parse(kind).mask(scores)
    if kind == "short groups":  # 2:4 with a group that keeps one: its values are not where exact 2:4 has them
        support = parse("2:4").mask(scores)
        support[0, :4] = torch.tensor([True, False, False, False])
        return support
    support = torch.full((out, n), kind != "empty", device=DEVICE)
    if kind == "empty rows":
        support[1] = support[-1] = False
    return support


def problem(
    out: int, n: int, kind: str | float, rank: int = 3, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Problem:
    support = choose_support(out, n, kind)
    S = draw(out, n, seed=2, dtype=dtype) * support
    mask, values = pack(S, support)
    A = draw(rank, n, seed=3, dtype=dtype) if rank else None
    B = draw(out, rank, seed=4, dtype=dtype) if rank else None
    return Problem(mask, values, A, B, draw(out, seed=5, dtype=dtype) if bias else None, S.double(), support)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of `dtype` of the largest entry: sums are in FP32, results rounded once."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    if actual.numel():
        scale = max(float(expected.abs().max()), 1e-30)
        assert float((actual.double() - expected).abs().max()) <= 8 * torch.finfo(dtype).eps * scale


# The tables


@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_the_index_finds_every_value(out: int, n: int, kind: str | float) -> None:
    case = problem(out, n, kind)
    index = build_index(case.mask, n)
    support = F.pad(case.support, (0, -n % 64)).unflatten(1, (-1, 64))
    counts = support.sum(-1)
    before = counts.flatten().cumsum(0).view_as(counts) - counts
    assert index.nonzeros == case.values.numel() and index.shape == tuple(counts.shape)
    if index.per_block:
        assert (counts == index.per_block).all()
    else:
        assert torch.equal(index.starts[:, None] + index.offsets, before)
    assert index.pairs == (n % 64 == 0 and bool((support.unflatten(-1, (-1, 4)).sum(-1) == 2).all()))
    assert torch.equal(row_starts(case.mask), F.pad(case.support.sum(1).cumsum(0), (1, 0)))


@pytest.mark.parametrize("n", [40_000, 70_000])
def test_long_rows_wrap_no_offset(n: int) -> None:
    mask, _ = pack(torch.zeros(2, n, device=DEVICE), torch.ones(2, n, dtype=torch.bool, device=DEVICE))
    mask[0, 0] = 0xFE  # else every block would keep 64, and there would be no table
    offsets = build_index(mask, n).offsets.to(torch.int64)
    assert torch.equal(offsets[1] % 2**16 if n < 2**16 else offsets[1], torch.arange(0, n, 64, device=DEVICE))


def test_what_is_kept_follows_its_tensor() -> None:
    mask = problem(4, 64, 0.5).mask
    first = index_of(mask, 64)
    assert index_of(mask, 64) is first
    mask.zero_()
    assert index_of(mask, 64).nonzeros == 0 and index_of(mask.clone(), 64) is not index_of(mask, 64)
    kept = len(resident._KEPT)
    del mask, first
    index_of(problem(2, 64, 0.5).mask, 64)
    assert len(resident._KEPT) <= kept  # the tables of dead tensors are dropped


def test_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparselr.kernels.index._LIMIT", 3)
    with pytest.raises(ValueError, match="keeps 64 values"):
        build_index(problem(2, 64, 0.5).mask, 64)


# Decode


def plans() -> list:
    if not TRITON:
        return []
    from hf_sparselr.kernels.decode import Plan

    return [Plan(False, 2, 1, 4), Plan(False, 4, 2, 8), Plan(True, 8, 1, 8), Plan(True, 4, 1, 4, split=3)]


def decode(x: torch.Tensor, case: Problem, plan) -> torch.Tensor:
    from hf_sparselr.kernels.decode import decode

    index = index_of(case.mask, x.shape[1])
    return decode(x, case.mask, index, case.values, case.A, case.B, case.bias, plan)


@needs_triton
@pytest.mark.parametrize("plan", plans(), ids=str)
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_decode(out: int, n: int, kind: str | float, plan) -> None:
    dtype = torch.bfloat16 if plan.matrix else torch.float32
    case = problem(out, n, kind, dtype=dtype)
    x = draw(2, n, seed=6, dtype=dtype)
    assert_near(decode(x, case, plan), case.expected(x), dtype)


@needs_triton
@pytest.mark.parametrize("plan", plans(), ids=str)
@pytest.mark.parametrize(
    ("rows", "rank", "bias"), [(1, 0, False), (3, 0, True), (3, 1, False), (16, 40, True)]
)
def test_decode_rows_ranks_and_bias(plan, rows: int, rank: int, bias: bool) -> None:
    case = problem(3, 70, 0.5, rank, bias, torch.float16)
    x = draw(rows, 70, seed=6, dtype=torch.float16)
    assert_near(decode(x, case, plan), case.expected(x), torch.float16)


@needs_triton
@pytest.mark.parametrize("plan", plans()[1:3], ids=str)
def test_decode_at_rank_512(plan) -> None:
    case = problem(3, 64, "2:4", 512, dtype=torch.bfloat16)
    x = draw(2, 64, seed=6, dtype=torch.bfloat16)
    assert_near(decode(x, case, plan), case.expected(x), torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("plan", plans()[1:3], ids=str)
def test_decode_takes_values_at_any_address(plan) -> None:
    case = problem(4, 64, "2:4", dtype=torch.bfloat16)
    storage = torch.cat([case.values[:1], case.values])
    case.values = storage[1:]  # not aligned to the words that 2:4 is read in
    assert case.values.data_ptr() % 8
    x = draw(1, 64, seed=6, dtype=torch.bfloat16)
    assert_near(decode(x, case, plan), case.expected(x), torch.bfloat16)


# Unpacking, and back


@needs_triton
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
@pytest.mark.parametrize("rank", [0, 3])
def test_densify(out: int, n: int, kind: str | float, rank: int) -> None:
    from hf_sparselr.kernels.densify import collect, densify

    case = problem(out, n, kind, rank)
    index = index_of(case.mask, n)
    dense = densify(case.mask, index, *case.packed[1:])
    assert_near(dense, case.dense, torch.float32)
    if rank == 0:
        assert torch.equal(dense.double(), case.S)
    assert torch.equal(collect(case.mask, index, dense), dense[case.support])


@needs_triton
def test_densify_in_16_bits_at_rank_80() -> None:
    from hf_sparselr.kernels.densify import densify

    case = problem(20, 130, 0.5, 80, dtype=torch.bfloat16)
    dense = densify(case.mask, index_of(case.mask, 130), *case.packed[1:])
    assert_near(dense, case.dense, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
def test_slabs_give_the_whole_product(bias: bool) -> None:
    from hf_sparselr.kernels.densify import unpacked_product

    case = problem(140, 8, 0.5, 2, bias)
    x = draw(3, 8, seed=6, dtype=torch.float32)
    index = index_of(case.mask, 8)
    for slabs in (1, 2):
        out = unpacked_product(x, case.mask, index, *case.packed[1:], case.bias, slabs)
        assert_near(out, case.expected(x), torch.float32)


# The CPU


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_one_row_on_the_cpu(out: int, n: int, kind: str | float, dtype: torch.dtype) -> None:
    case = problem(out, n, kind, 0, False, dtype)
    x = draw(n, seed=6, dtype=dtype).cpu()
    out_ = native.multiply(x, case.mask.cpu(), case.values.cpu(), row_starts(case.mask).cpu())
    assert_near(out_, case.expected(x.to(DEVICE)).cpu(), dtype)


# The entry


def layer_of(case: Problem, n: int, kernel: str = "auto") -> SparseLRLinear:
    S = case.S.to(case.values.dtype)
    layer = SparseLRLinear.from_decomposition(Decomposition(S, case.support, case.A, case.B), case.bias)
    layer.kernel = kernel
    return layer


@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
@pytest.mark.parametrize(
    "shape", [(100,), (1, 100), (2, 1, 100), (17, 100), (3, 25, 100), (0, 100), (2, 0, 100)]
)
def test_the_layer(kernel: str, shape: tuple) -> None:
    case = problem(9, 100, 0.5)
    x = draw(*shape, seed=6, dtype=torch.float32)
    layer = layer_of(case, 100, kernel)
    with torch.no_grad():
        assert_near(layer(x), case.expected(x), torch.float32)
        wide = draw(*shape[:-1], 200, seed=7, dtype=torch.float32)[..., ::2]
        assert wide.numel() == 0 or not wide.is_contiguous()
        assert_near(layer(wide), case.expected(wide), torch.float32)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("rank", [0, 3])
def test_compiled_equals_eager(rows: int, rank: int) -> None:
    torch._dynamo.reset()
    layer = layer_of(problem(9, 100, 0.5, rank), 100)
    compiled = torch.compile(layer, backend="eager" if not CUDA else "inductor", fullgraph=True)
    x = draw(rows, 100, seed=6, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_the_operators_are_well_defined() -> None:
    case = problem(5, 12, 0.5)
    x = draw(2, 12, seed=6, dtype=torch.float32)
    arguments = (x, *case.packed, case.bias, 12, "packed")
    torch.library.opcheck(ops.linear, arguments, test_utils=("test_schema", "test_faketensor"))


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(4, 8, 0.5)
    x = draw(1, 8, seed=6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"kernel='fast': expected one of 'auto', 'packed', 'dense'"):
        packed_linear(x, *case.packed, case.bias, 8, "fast")
    monkeypatch.setenv("HF_SPARSELR_KERNEL", "slow")
    with pytest.raises(ValueError, match="'slow'"):
        packed_linear(x, *case.packed, case.bias, 8)


def test_other_dtypes_are_refused() -> None:
    case = problem(4, 8, 0.5)
    with pytest.raises(
        TypeError, match=r"inputs of dtype torch\.float16 for a packed layer of dtype torch\.float32"
    ):
        packed_linear(draw(1, 8, seed=6, dtype=torch.float16), *case.packed, case.bias, 8)


def test_dense_keeps_one_copy_and_says_so_once(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    ops._say_dense_once.cache_clear()
    case = problem(6, 20, 0.5)
    layer, x = layer_of(case, 20), draw(3, 20, seed=6, dtype=torch.float32)
    monkeypatch.setenv("HF_SPARSELR_KERNEL", "dense")
    built = []
    monkeypatch.setattr(ops, "_dense", lambda *a, real=ops._dense: built.append(1) or real(*a))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_near(layer(x), case.expected(x), torch.float32)
        assert len(built) == 1
        layer.values.mul_(2)  # noticed
        case.S *= 2
        assert_near(layer(x), case.expected(x), torch.float32)
        assert_near(copy.deepcopy(layer)(x), case.expected(x), torch.float32)
    assert sum("stays in memory" in record.message for record in caplog.records) == 1


def test_the_kernel_is_chosen_on_loading(tmp_path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )  # fmt: skip
    settings = {
        "rank": 2,
        "refine": None,
        "calibration": torch.randint(0, 32, (2, 8)),
        "num_samples": 2,
        "seq_len": 8,
    }
    made = compress(
        LlamaForCausalLM(config).eval(), SparseLRConfig(**settings, kernel="packed", device="cpu")
    )
    made.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    dense = {"quantization_config": SparseLRConfig(kernel="dense")}
    for given, expected in (({}, "auto"), (dense, "dense")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
        assert {m.kernel for m in model.modules() if isinstance(m, SparseLRLinear)} == {expected}
    assert {m.kernel for m in made.modules() if isinstance(m, SparseLRLinear)} == {"packed"}
    with pytest.raises(ValueError, match="kernel='none'"):
        SparseLRConfig(kernel="none")


def test_bench_kernels(tmp_path, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = "--shapes 24x36 --rows 1 3 --patterns 2:4 0.7 --rank 2 --dtype float32 --repeats 2 --device cpu".split()
    bench.run(parser.parse_args([*arguments, "--json", str(tmp_path / "out.json")]))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(r["pattern"], r["rows"]) for r in results] == [("2:4", 1), ("2:4", 3), ("0.7", 1), ("0.7", 3)]
    assert all(r["error"] < 1e-5 and r["speedup"] > 0 for r in results)
    assert "24x36" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--shapes='24'"):
        bench.run(parser.parse_args(["--shapes", "24"]))


# What only a GPU can show


def both_gradients(case: Problem, n: int, rows: int) -> list[list[torch.Tensor]]:
    layer = layer_of(case, n)
    parts = [draw(rows, n, seed=6), *(t.double() for t in (case.S, case.A, case.B, case.bias))]
    parts = [part.clone().requires_grad_() for part in parts]
    x, S, A, B, bias = parts
    F.linear(x, S + B @ A, bias).square().sum().backward()
    expected = [x.grad, S.grad[case.support], A.grad, B.grad, bias.grad]
    for parameter in (layer.values, layer.A, layer.B, layer.bias):
        parameter.requires_grad_(True)
    inputs = x.detach().to(layer.values.dtype).requires_grad_()
    layer(inputs).float().square().sum().backward()
    return [expected, [inputs.grad, *(getattr(layer, name).grad for name in ("values", "A", "B", "bias"))]]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["2:4", 0.6])
@pytest.mark.parametrize("rows", [2, 100])
def test_gradients_on_the_gpu(dtype: torch.dtype, kind: str | float, rows: int) -> None:
    for expected, actual in zip(*both_gradients(problem(48, 128, kind, dtype=dtype), 128, rows), strict=True):
        assert (actual.double() - expected).norm() <= (
            1e-4 if dtype == torch.float32 else 0.03
        ) * expected.norm()


@needs_cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
def test_compiled_on_the_gpu(mode: str, kernel: str) -> None:
    torch._dynamo.reset()
    layers = nn.Sequential(
        *(layer_of(problem(64, 64, kind, dtype=torch.bfloat16), 64, kernel) for kind in (0.5, "2:4"))
    )
    compiled = torch.compile(layers, mode=mode, fullgraph=True)
    x = draw(1, 64, seed=6, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(compiled(x).clone(), layers(x))
            x = x + 1


@needs_cuda
def test_a_cuda_graph_needs_one_run_before() -> None:
    layer, x = (
        layer_of(problem(64, 64, 0.5, dtype=torch.bfloat16), 64),
        draw(1, 64, seed=6, dtype=torch.bfloat16),
    )
    with torch.no_grad():
        expected, graph = layer(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        graph.replay()
        assert torch.equal(out, expected)


@needs_cuda
def test_several_streams() -> None:
    case = problem(256, 512, 0.5, dtype=torch.bfloat16)
    layer, xs = layer_of(case, 512), [draw(1, 512, seed=s, dtype=torch.bfloat16) for s in range(8)]
    streams, outs = [torch.cuda.Stream() for _ in xs], []
    with torch.no_grad():
        expected = [layer(x) for x in xs]
        torch.cuda.synchronize()
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(layer(x))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@needs_cuda
@pytest.mark.parametrize(("out", "n"), [(14336, 4096), (4096, 14336), (1000, 1544)])
@pytest.mark.parametrize("kind", ["2:4", "0.5", "0.7"])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_large_layers(out: int, n: int, kind: str, rows: int) -> None:
    pattern = parse(kind if ":" in kind else float(kind))
    layer = bench.random_layer((out, n), pattern, 64, torch.bfloat16, torch.device(DEVICE))
    x = draw(rows, n, seed=6, dtype=torch.bfloat16)
    with torch.no_grad():
        dense = layer.to_dense().weight.double()
        for kernel in ("auto", "packed"):
            layer.kernel = kernel
            error = (layer(x).double() - x.double() @ dense.T).norm() / (x.double() @ dense.T).norm()
            assert error < 0.01
