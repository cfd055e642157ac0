"""The packed product on a GPU: gradients, graphs, streams, timing, and sizes that the interpreter is too slow for."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.kernel_cases import DEVICE, Problem, assert_near, draw, layer_of, problem
from torch import nn
from torch.nn import functional as F

from hf_sparselr.bench import kernels as bench
from hf_sparselr.format.patterns import parse
from hf_sparselr.kernels import ops, packed_linears
from hf_sparselr.kernels.support_index import index_of
from hf_sparselr.kernels.timing import milliseconds

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["2:4", 0.6])
@pytest.mark.parametrize("rows", [2, 100])
def test_gradients_on_the_gpu(dtype: torch.dtype, kind: str | float, rows: int) -> None:
    for expected, actual in zip(*both_gradients(problem(48, 128, kind, dtype=dtype), 128, rows), strict=True):
        assert (actual.double() - expected).norm() <= (
            1e-4 if dtype == torch.float32 else 0.03
        ) * expected.norm()


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


def test_without_triton_the_reference_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TRITON", False)
    case, x = problem(9, 100, 0.5), draw(2, 100, seed=6, dtype=torch.float32)
    layer = layer_of(case, 100)
    assert_near(layer(x), case.expected(x), torch.float32)
    assert not index_of(layer.mask, 100).plans


def test_timing_is_of_the_device() -> None:
    a = torch.randn(4096, 4096, device=DEVICE)
    slow, fast = (milliseconds(lambda n=n: torch.mm(a[:n], a), a.device) for n in (4096, 64))
    assert 4 * fast < slow < 1000
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(graph):
        milliseconds(lambda: a + 1, a.device)


def test_a_choice_is_made_once_and_kept_on_disk(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparselr.kernels import autotune as choice
    from hf_sparselr.kernels.triton.decode import Packed

    monkeypatch.setattr(choice, "HF_HOME", str(tmp_path))
    choice._file.cache_clear(), choice._table.cache_clear()
    case = problem(192, 320, 0.5, dtype=torch.bfloat16)
    layer, x = layer_of(case, 320), draw(3, 320, seed=6, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_near(layer(x), case.expected(x), torch.bfloat16)
    packed = Packed.of(*layer.parts, 320)
    made, without = choice.known(3, packed, False), packed._replace(A=None, B=None)
    assert made is not None and choice.known(4, packed, False) == made
    assert choice.known(3, without, False) is None and choice.known(9, packed, True) is None
    choice._table.cache_clear(), packed.index.plans.clear()
    assert choice.known(3, packed, False) == choice.known(3, packed, True) == made
    choice._file.cache_clear(), choice._table.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["2:4", 0.5])
@pytest.mark.parametrize("rows", [1, 8])
def test_layers_that_share_a_launch_come_out_as_alone(
    rows: int, kind: str | float, dtype: torch.dtype
) -> None:
    layers = [layer_of(problem(out, 320, kind, dtype=dtype), 320) for out in (500, 96, 7)]
    parts = [layer.parts for layer in layers]
    x = draw(rows, 320, seed=6, dtype=dtype)
    with torch.no_grad():
        for layer, together in zip(layers, packed_linears(x, parts, 320), strict=True):
            assert torch.equal(layer(x), together)


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


@pytest.mark.parametrize(("out", "n"), [(14336, 4096), (4096, 14336), (1000, 1544)])
@pytest.mark.parametrize("kind", ["2:4", "0.5", "0.7"])
@pytest.mark.parametrize("rows", [1, 8, 40, 1100])
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


@pytest.mark.parametrize(("out", "n"), [(14336, 4096), (4096, 14336), (1000, 1544)])
@pytest.mark.parametrize("kind", ["2:4", "0.5"])
@pytest.mark.parametrize("rows", [17, 40, 100, 200])
def test_large_blocks(out: int, n: int, kind: str, rows: int) -> None:
    from hf_sparselr.kernels.launch_config import BLOCKS
    from hf_sparselr.kernels.triton.decode import Packed
    from hf_sparselr.kernels.triton.medium_batch import multiply_blocks

    pattern = parse(kind if ":" in kind else float(kind))
    layer = bench.random_layer((out, n), pattern, 64, torch.bfloat16, torch.device(DEVICE))
    x = draw(rows, n, seed=6, dtype=torch.bfloat16)
    expected = x.double() @ layer.to_dense().weight.double().T
    for plan in BLOCKS:
        assert_near(multiply_blocks(x, Packed.of(*layer.parts, n), plan), expected, torch.bfloat16)


# The sparse tensor cores


@pytest.mark.gpu(capability=(9, 0))  # the only one it was tried on
@pytest.mark.parametrize(
    ("out", "n", "rank"), [(64, 64, 0), (192, 1088, 64), (4096, 4096, 0), (576, 1536, 32)]
)
def test_what_the_sparse_tensor_cores_read_is_what_torch_makes(out: int, n: int, rank: int) -> None:
    from hf_sparselr.kernels.cuda.sparse_cores import arrange, prepare
    from hf_sparselr.kernels.triton.decode import Packed

    assert prepare(torch.device(DEVICE, torch.cuda.current_device()), capturing=False)
    case = problem(out, n, "2:4", rank, dtype=torch.bfloat16)
    dense = case.S.bfloat16()
    if rank:
        keeps = torch.arange(rank, device=DEVICE) % 4 < 2
        dense = torch.cat([dense, case.B * keeps, case.B * ~keeps], 1)
    expected = torch._cslt_compress(dense)
    actual = arrange(Packed.of(*case.packed, None, n), joined=rank > 0)
    assert actual.shape == expected.shape
    assert torch.equal(actual.view(torch.int16), expected.view(torch.int16))


@pytest.mark.gpu(capability=(9, 0))  # the only one it was tried on
@pytest.mark.parametrize(("rank", "bias", "forms"), [
    (0, True, ["sparse"]), (48, False, ["sparse"]), (64, True, ["sparse", "joined"]),
])  # fmt: skip
@pytest.mark.parametrize("rows", [257, 2048])
def test_products_on_the_sparse_tensor_cores(rows: int, rank: int, bias: bool, forms: list[str]) -> None:
    from hf_sparselr.kernels.cuda.sparse_cores import multiply_sparse, sparse_plans
    from hf_sparselr.kernels.triton.decode import Packed

    case = problem(1536, 576, "2:4", rank, bias, torch.bfloat16)
    layer, x = layer_of(case, 576), draw(rows, 576, seed=6, dtype=torch.bfloat16)
    flat = torch.cat([x[0, :1], x.flatten()])[1:]  # at an odd address
    packed = Packed.of(*layer.parts, 576)
    plans = sparse_plans(x, packed)
    assert [plan.form for plan in plans] == forms
    for plan in plans:
        for captured in (True, False):
            packed.index.plans[1 << (rows - 1).bit_length(), rank, torch.bfloat16, captured] = plan
        with torch.no_grad():
            out, odd, graph = layer(x), layer(flat.view(rows, 576)), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = layer(x)
            graph.replay()
        assert_near(out, case.expected(x), torch.bfloat16)
        assert torch.equal(out, again) and torch.equal(out, odd)
    values = torch.cat([case.values[:1], case.values])[1:]
    assert values.data_ptr() % 8
    B = packed.B if packed.B is None else torch.cat([packed.B.flatten()[:1], packed.B.flatten()])[1:]
    moved = packed._replace(values=values, B=B if B is None else B.view_as(packed.B))
    out = multiply_sparse(x, moved, plans[-1])
    assert_near(out, case.expected(x), torch.bfloat16)


@pytest.mark.gpu(capability=(9, 0))  # the only one it was tried on
@pytest.mark.parametrize(("warm", "form"), [(True, "sparse"), (False, "folded")])
def test_sparse_in_a_graph_only(warm: bool, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuSPARSELt is made for a thread before a capture in it, though the eager call does without."""
    from hf_sparselr.kernels.launch_config import Plan
    from hf_sparselr.kernels.triton import product as ways

    case = problem(192, 128, "2:4", dtype=torch.bfloat16)
    layer, x = layer_of(case, 128), draw(300, 128, seed=6, dtype=torch.bfloat16)
    plans, real, taken = index_of(layer.mask, 128).plans, ways._run, []
    plans[512, 3, torch.bfloat16, True], plans[512, 3, torch.bfloat16, False] = Plan("sparse"), Plan("folded")
    monkeypatch.setattr(
        ways, "_run", lambda x, layers, plan: taken.append(plan.form) or real(x, layers, plan)
    )

    def capture() -> torch.Tensor:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            if warm:
                layer(x)
            with torch.cuda.graph(graph, stream=stream):
                out = layer(x)
            graph.replay()
        stream.synchronize()
        return out

    with ThreadPoolExecutor(1) as pool:
        assert_near(pool.submit(capture).result(), case.expected(x), torch.bfloat16)
    assert taken == ["folded"] * warm + [form]


@pytest.mark.gpu(capability=(9, 0))  # the only one it was tried on
def test_where_the_sparse_tensor_cores_are_not_tried() -> None:
    from hf_sparselr.kernels.cuda.sparse_cores import sparse_plans
    from hf_sparselr.kernels.triton.decode import Packed

    for out, n, dtype in [(64, 64, torch.float16), (60, 64, torch.bfloat16), (64, 96, torch.bfloat16)]:
        case = problem(out, n, "2:4", dtype=dtype)
        assert not sparse_plans(draw(257, n, seed=6, dtype=dtype), Packed.of(*case.packed, None, n))


@pytest.mark.gpu(count=2, capability=(9, 0))
def test_the_sparse_tensor_cores_of_a_second_gpu() -> None:
    from hf_sparselr.kernels.cuda.sparse_cores import multiply_sparse, sparse_plans
    from hf_sparselr.kernels.triton.decode import Packed

    case = problem(1536, 576, "2:4", 64, dtype=torch.bfloat16)
    layer, x = layer_of(case, 576), draw(2048, 576, seed=6, dtype=torch.bfloat16)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        with torch.cuda.device(device):
            there = layer.to(device)
            packed = Packed.of(*there.parts, 576)
            for plan in sparse_plans(x.to(device), packed):
                out = multiply_sparse(x.to(device), packed, plan)
                assert_near(out.to(x.device), case.expected(x), torch.bfloat16)
