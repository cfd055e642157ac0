"""The packed product on a GPU: gradients, graphs, streams, timing, and sizes that the interpreter is too slow for."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers.kernel_cases import DEVICE, Problem, assert_near, draw, layer_of, problem
from torch import nn
from torch.nn import functional as F

from hf_sparselr.bench import kernels as bench
from hf_sparselr.format.patterns import parse
from hf_sparselr.kernels import dispatch, ops, packed_linears
from hf_sparselr.kernels.bindings import binding_of
from hf_sparselr.kernels.launch_config import GEMV, MEDIUM_BATCH, LaunchConfig
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
        assert (actual.double() - expected).norm() <= (1e-4 if dtype == torch.float32 else 0.03) * expected.norm()


@pytest.mark.parametrize("kind", ["2:4", 0.6])
@pytest.mark.parametrize("rows", [2, 100, 600])
@pytest.mark.parametrize("given", [False, True])
def test_training_goes_through_c(rows: int, kind: str | float, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(192, 128, kind, 16, dtype=torch.bfloat16)
    layer = layer_of(case, 128)
    x = draw(rows, 128, seed=6, dtype=torch.bfloat16).requires_grad_()
    grad = draw(rows, 192, seed=7, dtype=torch.bfloat16)
    factors = (layer.A.detach().requires_grad_(), layer.B.detach().requires_grad_()) if given else None
    leaves = [x, *(factors or ())]

    def step() -> list[torch.Tensor]:
        out = layer(x, factors=factors)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    first = step()
    assert_near(first[0], case.expected(x.detach()), torch.bfloat16)
    assert_near(first[1], grad.double() @ case.dense, torch.bfloat16)
    monkeypatch.setattr(ops, "products", lambda *given: pytest.fail("through Python"))
    monkeypatch.setattr(ops, "_input_gradient", lambda *given: pytest.fail("through Python"))
    with torch.autocast("cuda", torch.bfloat16):
        second = step()
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, step()))
    layer.values.data.mul_(2)  # where they are
    case.S = case.S * 2
    assert_near(step()[0], case.expected(x.detach()), torch.bfloat16)
    if given:
        with torch.no_grad():
            assert_near(layer(x, factors=factors), case.expected(x.detach()), torch.bfloat16)
    x = draw(rows, 128, seed=6, dtype=torch.bfloat16)
    assert not layer(x).requires_grad
    monkeypatch.undo()
    layer.mask.zero_()
    with pytest.raises(ValueError, match="but the mask keeps 0"):
        layer(x.requires_grad_(), factors=factors)


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
    monkeypatch.setattr(ops, "TRITON", False), monkeypatch.setattr(dispatch, "TRITON", False)
    case, x = problem(9, 100, 0.5), draw(2, 100, seed=6, dtype=torch.float32)
    layer = layer_of(case, 100)
    from hf_sparselr.kernels import gpu

    monkeypatch.setattr(gpu, "multiply", lambda *given: pytest.fail("a kernel in Triton"))
    assert_near(layer(x), case.expected(x), torch.float32)


def test_timing_is_of_the_device() -> None:
    a = torch.randn(4096, 4096, device=DEVICE)
    slow, fast = (milliseconds(lambda n=n: torch.mm(a[:n], a), a.device) for n in (4096, 64))
    assert 4 * fast < slow < 1000
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(graph):
        milliseconds(lambda: a + 1, a.device)


def test_a_choice_is_made_once_and_kept_on_disk(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparselr.kernels import autotune, gpu

    monkeypatch.setattr(autotune, "HF_HOME", str(tmp_path))
    autotune._file.cache_clear(), autotune._table.cache_clear()
    monkeypatch.setattr(gpu, "measured", lambda *given: None)
    case = problem(192, 320, 0.5, dtype=torch.bfloat16)
    layer, x = layer_of(case, 320), draw(3, 320, seed=6, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_near(layer(x), case.expected(x), torch.bfloat16)
    weight = layer.packed_weight
    made, without = autotune.known(3, weight), weight._replace(A=None, B=None)
    assert made is not None and autotune.known(4, weight) == made
    assert autotune.known(3, without) is None and autotune.known(9, weight) is None
    autotune._table.cache_clear()
    assert autotune.known(3, weight) == made
    autotune._file.cache_clear(), autotune._table.cache_clear()


def use(layer: nn.Module, rows: int, config: LaunchConfig) -> None:
    """Makes a layer take a configuration, as if it had been chosen."""
    from hf_sparselr.kernels import gpu
    from hf_sparselr.kernels.launch_config import NATIVE_ROWS, bucket

    weights = [layer.packed_weight]
    key = rows if rows <= NATIVE_ROWS else bucket(rows), layer.kernel
    binding_of(weights).products[key] = gpu.run(rows, weights, config)


@pytest.mark.parametrize("kind", ["2:4", 0.5])
@pytest.mark.parametrize("rows", [1, 3, 16, 20, 300])
def test_ready_kernels_follow_edits_and_inputs(rows: int, kind: str | float) -> None:
    case = problem(70, 320, kind, dtype=torch.bfloat16)
    layer = layer_of(case, 320)
    with torch.no_grad():
        for seed in (6, 7):
            x = draw(rows, 320, seed=seed, dtype=torch.bfloat16)
            flat = torch.cat([x[0, :1], x.flatten()])[1:].view(rows, 320)  # at an odd address
            for given in (x, flat, x.T.contiguous().T, x.view(1, rows, 320)):
                out = layer(given)
                assert out.shape == (*given.shape[:-1], 70)
                assert_near(out.view(rows, 70), case.expected(x), torch.bfloat16)
        layer.values.data.mul_(2)  # the memory of case.values
        layer.bias.data = layer.bias.data + 1
        case.S, case.bias = case.S * 2, case.bias + 1
        assert_near(layer(x), case.expected(x), torch.bfloat16)
        layer.mask.zero_()
        with pytest.raises(ValueError, match="but the mask keeps 0"):
            layer(x)


def test_ready_kernels_are_launched_by_the_driver() -> None:
    from hf_sparselr.kernels.launch import drives

    layer = layer_of(problem(70, 320, 0.5, dtype=torch.bfloat16), 320)
    with torch.no_grad():
        layer(draw(1, 320, seed=6, dtype=torch.bfloat16))
    assert drives() and binding_of([layer.packed_weight]).products


def test_memory_is_freed_with_the_layer() -> None:
    before = torch.cuda.memory_allocated()
    layer = layer_of(problem(700, 3200, 0.5, dtype=torch.bfloat16), 3200)
    with torch.no_grad():
        for rows in (1, 8, 40, 300):
            layer(draw(rows, 3200, seed=6, dtype=torch.bfloat16))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() > before
    del layer
    assert torch.cuda.memory_allocated() - before < 2**23  # workspaces of cuBLAS


def test_threads_share_a_layer_on_the_gpu() -> None:
    case = problem(256, 512, 0.5, dtype=torch.bfloat16)
    layer, xs = layer_of(case, 512), [draw(2, 512, seed=s, dtype=torch.bfloat16) for s in range(8)]
    with torch.no_grad():
        expected = [layer(x) for x in xs]

        def run(number: int) -> bool:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                outs = [layer(xs[number]) for _ in range(50)]
                torch.cuda.current_stream().synchronize()
                return all(torch.equal(out, expected[number]) for out in outs)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(run, range(8)))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_new_thread_begins_with_a_packed_layer(rows: int, known: bool) -> None:
    case, x = problem(70, 320, "2:4", dtype=torch.bfloat16), draw(rows, 320, seed=6, dtype=torch.bfloat16)
    layer = layer_of(case, 320)
    used = layer if known else layer_of(case, 320)

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            return [used(x) for _ in range(3)]

    with torch.no_grad():
        expected = layer(x)
        outs = [layer(x) for _ in range(9)]
    del outs  # memory for results: else the first allocation is what calls CUDA's runtime
    with ThreadPoolExecutor(1) as pool:
        assert all(torch.equal(out, expected) for out in pool.submit(results).result())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["2:4", 0.5])
@pytest.mark.parametrize("rows", [1, 8, 20, 200])
def test_layers_that_share_a_launch_come_out_as_alone(rows: int, kind: str | float, dtype: torch.dtype) -> None:
    sizes = (500, 4), (96, 20), (70, 64), (64, 3), (128, 16)
    layers = [layer_of(problem(out, 320, kind, rank, dtype=dtype), 320) for out, rank in sizes]
    weights = [layer.packed_weight for layer in layers]
    x = draw(rows, 320, seed=6, dtype=dtype)
    with torch.no_grad():
        for layer, together in zip(layers, packed_linears(x, weights), strict=True):
            assert torch.equal(layer(x), together)


@pytest.mark.parametrize("rows", [1, 40])
def test_another_thread_may_use_the_stream_between_two_steps(rows: int) -> None:
    from hf_sparselr.kernels import gpu

    case, x = problem(70, 320, 0.5, 20, dtype=torch.bfloat16), draw(rows, 320, seed=6, dtype=torch.bfloat16)
    weight, program = case.weight, gpu.run(rows, [case.weight], {1: GEMV[0], 40: MEDIUM_BATCH[1]}[rows])
    first, *others = program.steps
    assert others

    class Elsewhere:
        def run(self, slots: list, weights: list) -> None:
            program(draw(rows, 320, seed=7, dtype=torch.bfloat16), rows, [weight])

    (out,) = replace(program, steps=(first, Elsewhere(), *others))(x, rows, [weight])
    assert_near(out, case.expected(x), torch.bfloat16)


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
def test_large_medium_batches(out: int, n: int, kind: str, rows: int) -> None:
    from hf_sparselr.kernels import gpu

    pattern = parse(kind if ":" in kind else float(kind))
    layer = bench.random_layer((out, n), pattern, 64, torch.bfloat16, torch.device(DEVICE))
    x, weights = draw(rows, n, seed=6, dtype=torch.bfloat16), [layer.packed_weight]
    expected = x.double() @ layer.to_dense().weight.double().T
    for config in MEDIUM_BATCH:
        assert_near(gpu.run(rows, weights, config)(x, rows, weights)[0], expected, torch.bfloat16)


# The kernel in CUDA C++

MMA_CASES = [  # odd sizes, empty and full rows, more than a step, more than one part of the factors
    (9, 104, 0.5), (70, 320, "2:4"), (33, 1088, "2:4"), (33, 1096, 0.6), (5, 128, "empty rows"), (3, 72, "full"),
    (40, 512, "4:8"), (6, 256, "1:4"),
]  # fmt: skip


def mma_configs(kind: str | float, rows: int = 1) -> tuple[LaunchConfig, ...]:
    from hf_sparselr.kernels.launch_config import MMA, MMA_PAIRS, MMA_PAIRS_WIDE, MMA_WIDE

    if rows > 16:
        return MMA_PAIRS_WIDE if kind == "2:4" else MMA_WIDE
    return MMA_PAIRS if kind == "2:4" else MMA


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "bias"), [(0, True), (3, False), (20, True), (200, False)])
@pytest.mark.parametrize(("out", "n", "kind"), MMA_CASES)
def test_mma(out: int, n: int, kind: str | float, rank: int, bias: bool, dtype: torch.dtype) -> None:
    from hf_sparselr.kernels import gpu
    from hf_sparselr.kernels.cuda import small_batch
    from hf_sparselr.kernels.support_index import index_of

    case = problem(out, n, kind, rank, bias, dtype)
    assert small_batch.supports(case.weight, index_of(case.mask, n))
    weights = [case.weight]
    for rows in (1, 8, 13, 27):
        x, configs = draw(rows, n, seed=6, dtype=dtype), mma_configs(kind, rows)
        config = configs[rows % len(configs)]
        assert_near(gpu.run(rows, weights, config)(x, rows, weights)[0], case.expected(x), dtype)


@pytest.mark.parametrize("kind", ["2:4", 0.5])
def test_every_configuration_of_mma(kind: str | float) -> None:
    from hf_sparselr.kernels import gpu

    cases = [problem(out, 1088, kind, rank, dtype=torch.bfloat16) for out, rank in ((500, 64), (96, 8), (7, 16))]
    weights = [case.weight for case in cases]
    for rows in (3, 16, 32):
        for config in mma_configs(kind, rows):
            x = draw(rows, 1088, seed=6, dtype=torch.bfloat16)
            together = gpu.run(rows, weights, config)(x, rows, weights)
            for case, out in zip(cases, together, strict=True):
                assert_near(out, case.expected(x), torch.bfloat16)
                assert torch.equal(out, gpu.run(rows, [case.weight], config)(x, rows, [case.weight])[0])


@pytest.mark.parametrize("kind", ["2:4", 0.5])
def test_mma_multiplies_only_kept_columns(kind: str | float) -> None:
    from hf_sparselr.kernels import gpu

    case = problem(40, 320, kind, 0, False, torch.bfloat16)
    for column in (0, 37, 200, 319):
        x = torch.zeros(2, 320, dtype=torch.bfloat16, device=DEVICE)
        x[1, column] = 2.0**100
        out = gpu.run(2, [case.weight], mma_configs(kind)[0])(x, 2, [case.weight])[0]
        assert torch.equal(out[1].double(), case.S[:, column].double() * 2.0**100) and not out[0].any()


@pytest.mark.parametrize("kind", ["2:4", 0.5])
def test_mma_reads_no_value_that_is_not_there(kind: str | float) -> None:
    """A mask that was edited behind torch's back: whatever comes out, nothing beyond the values is read (run this under
    compute-sanitizer)."""
    from hf_sparselr.kernels import gpu

    case = problem(70, 1088, kind, 8, dtype=torch.bfloat16)
    weights, x = [case.weight], draw(3, 1088, seed=6, dtype=torch.bfloat16)
    product = gpu.run(3, weights, mma_configs(kind)[0])
    case.mask.data.fill_(255)
    product(x, 3, weights)
    case.mask.data.random_(0, 256)
    product(x, 3, weights)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "bias"), [(0, True), (4, False), (20, True), (64, False)])
@pytest.mark.parametrize(("out", "n"), [(9, 128), (70, 320), (300, 1088)])
def test_tiles(out: int, n: int, rank: int, bias: bool, dtype: torch.dtype) -> None:
    from hf_sparselr.kernels import gpu
    from hf_sparselr.kernels.launch_config import TILES

    case = problem(out, n, "2:4", rank, bias, dtype)
    weights = [case.weight]
    for rows in (17, 33, 64, 100, 129, 300):
        x = draw(rows, n, seed=6, dtype=dtype)
        for config in TILES:
            out = gpu.run(rows, weights, config)(x, rows, weights)[0]
            assert_near(out, case.expected(x), dtype)


def test_tiles_serve_other_numbers_of_rows_and_read_no_value_that_is_not_there() -> None:
    from hf_sparselr.kernels import gpu
    from hf_sparselr.kernels.launch_config import TILES

    case = problem(70, 1088, "2:4", 8, dtype=torch.bfloat16)
    weights, product = [case.weight], gpu.run(33, [case.weight], TILES[1])
    for rows in (64, 33, 50):
        x = draw(rows, 1088, seed=6, dtype=torch.bfloat16)
        assert_near(product(x, rows, weights)[0], case.expected(x), torch.bfloat16)
    case.mask.data.random_(0, 256)  # behind torch's back: whatever comes out (run this under compute-sanitizer)
    product(x, 50, weights)
    torch.cuda.synchronize()


@pytest.mark.gpu(count=2)
def test_a_layer_on_a_second_gpu() -> None:
    case = problem(1536, 576, "2:4", 64, dtype=torch.bfloat16)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        layer = layer_of(case, 576).to(device)
        for rows in (1, 8, 40, 2048):
            x = draw(rows, 576, seed=6, dtype=torch.bfloat16)
            with torch.no_grad():  # the current device stays the first
                assert_near(layer(x.to(device)).to(x.device), case.expected(x), torch.bfloat16)
