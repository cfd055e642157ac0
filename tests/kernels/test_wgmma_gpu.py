"""The product on the sparse tensor cores of compute capability 9.0 (`cuda/wgmma.cu`)."""

import pytest
import torch
from helpers.kernel_cases import DEVICE, Problem, assert_near, draw, problem

from hf_sparselr.bench import kernels as bench
from hf_sparselr.format.patterns import parse
from hf_sparselr.kernels import gpu, packed_linear, packed_linears
from hf_sparselr.kernels.cuda.low_rank import factor_step, wide_shape
from hf_sparselr.kernels.cuda.wgmma import supports_wgmma
from hf_sparselr.kernels.launch_config import LaunchConfig

pytestmark = pytest.mark.gpu(capability=(9, 0))

CONFIGS = [
    LaunchConfig("wgmma", tall, split=split, resident=resident, batch=batch, cluster=cluster)
    for tall, batch, split, resident, cluster in (
        (64, 16, 3, 3, 1), (64, 32, 1, 2, 1), (64, 64, 8, 2, 1), (128, 64, 2, 1, 1), (128, 128, 3, 1, 1),
        (64, 128, 1, 2, 2), (128, 256, 1, 1, 1), (128, 256, 1, 1, 4), (128, 256, 2, 1, 2),
    )
]  # fmt: skip
CASES = [(9, 128), (70, 320), (300, 1088), (129, 64)]  # rows of S within a block and beyond, columns within a stage


def product(case: Problem, rows: int, config: LaunchConfig, x: torch.Tensor) -> torch.Tensor:
    return gpu.run(rows, [case.weight], config)(x, rows, [case.weight])[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "bias"), [(0, True), (8, False), (72, True), (64, False)])
@pytest.mark.parametrize(("out", "n"), CASES)
def test_every_configuration(out: int, n: int, rank: int, bias: bool, dtype: torch.dtype) -> None:
    case = problem(out, n, "2:4", rank, bias, dtype)
    assert supports_wgmma(case.weight)
    for rows in (1, 17, 64, 65, 129, 300, 515):
        x = draw(rows, n, seed=6, dtype=dtype)
        for config in CONFIGS:
            assert_near(product(case, rows, config, x), case.expected(x), dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_each_column_meets_its_value(config: LaunchConfig) -> None:
    case = problem(200, 320, "2:4", 0, False, torch.bfloat16)
    for first in range(0, 320, 64):
        x = torch.zeros(64, 320, dtype=torch.bfloat16, device=DEVICE)
        x[torch.arange(64), first + torch.arange(64)] = 1
        out = product(case, 64, config, x)
        assert torch.equal(out.double(), case.S[:, first : first + 64].T)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_of_x_do_not_meet(config: LaunchConfig) -> None:
    case = problem(72, 256, "2:4", 8, True, torch.bfloat16)
    x = draw(300, 256, seed=6, dtype=torch.bfloat16)
    expected = product(case, 300, config, x)
    for row in (0, 31, 299):
        spoilt = x.clone()
        spoilt[row] = float("nan")
        out = product(case, 300, config, spoilt)
        assert out[row].isnan().all()
        out[row] = expected[row]
        assert torch.equal(out, expected)


def test_one_program_serves_other_numbers_of_rows_and_reads_nothing_that_is_not_there() -> None:
    """Whatever comes out of a mask that was edited behind torch's back (run this under compute-sanitizer)."""
    for config in CONFIGS:
        case = problem(70, 1088, "2:4", 8, dtype=torch.bfloat16)
        weights = [case.weight]
        program = gpu.run(64, weights, config)
        for rows in (64, 33, 50, 7):
            x = draw(rows, 1088, seed=6, dtype=torch.bfloat16)
            assert_near(program(x, rows, weights)[0], case.expected(x), torch.bfloat16)
        case.mask.data.random_(0, 256)
        program(x, rows, weights)
        torch.cuda.synchronize()


@pytest.mark.parametrize(("out", "n"), [(14336, 4096), (4096, 14336), (1000, 1600)])
@pytest.mark.parametrize("rows", [17, 40, 100, 200, 500, 1100, 2048])
def test_large_layers_as_a_layer_calls_them(out: int, n: int, rows: int) -> None:
    layer = bench.random_layer((out, n), parse("2:4"), 64, torch.bfloat16, torch.device(DEVICE))
    x = draw(rows, n, seed=6, dtype=torch.bfloat16)
    assert gpu.select(x, rows, layer.packed_weight, "auto").kernel == "wgmma"
    with torch.no_grad():
        expected = x.double() @ layer.to_dense().weight.double().T
        assert (layer(x).double() - expected).norm() < 0.01 * expected.norm()
        odd = torch.cat([x[0, :1], x.flatten()])[1:].view(rows, n)  # at an odd address
        assert torch.equal(layer(odd), layer(x)) and torch.equal(layer(x.T.contiguous().T), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "rank"), [(8, 3), (128, 8), (1096, 72), (4096, 64)])
def test_low_rank_factor(n: int, rank: int, dtype: torch.dtype) -> None:
    weight = problem(4, n, 0.5, rank, dtype=dtype).weight
    for rows in (1, 17, 64, 100, 250, 400, 700, 1500, 3000, 5000):
        x, u = draw(rows, n, seed=6, dtype=dtype), torch.empty(rows, rank, dtype=dtype, device=DEVICE)
        for blocks in (100, 132):  # that leave room for a few more, or none
            u.fill_(float("nan"))
            shape = wide_shape(rows, [rank], blocks, 132)
            factor_step(rows, weight, 2, shape).run([rows, x, u], [weight])
            assert_near(u, x.double() @ weight.A.double().T, dtype)


def test_in_a_graph_and_without_the_host_waiting() -> None:
    case = problem(256, 512, "2:4", 16, True, torch.bfloat16)
    x = draw(100, 512, seed=6, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, graph = packed_linear(x, case.weight), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = packed_linear(x, case.weight)
        for seed in (7, 8):
            x.copy_(draw(100, 512, seed=seed, dtype=torch.bfloat16))
            graph.replay()
            assert torch.equal(out, packed_linear(x, case.weight))
        assert not torch.equal(out, expected)


def test_weights_that_it_does_not_take() -> None:
    for n, rank in ((72, 8), (128, 4), (128, 20)):
        case = problem(40, n, "2:4", rank, dtype=torch.bfloat16)
        x = draw(100, n, seed=6, dtype=torch.bfloat16)
        assert not supports_wgmma(case.weight) and gpu.select(x, 100, case.weight, "auto").kernel != "wgmma"
        assert_near(packed_linear(x, case.weight), case.expected(x), torch.bfloat16)
    case = problem(40, 128, "2:4", 8, dtype=torch.bfloat16)
    B = torch.cat([case.B.flatten()[:1], case.B.flatten()])[1:].view_as(case.B)
    assert not supports_wgmma(case.weight._replace(B=B))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ranks", "bias"), [((8, 24, 64, 8, 16), True), ((0,) * 5, False)])
def test_weights_that_share_an_input_share_a_launch(
    ranks: tuple[int, ...], bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = (300, 70, 129, 64, 9)
    cases = [problem(out, 1088, "2:4", rank, bias, dtype) for out, rank in zip(outs, ranks, strict=True)]
    weights = [case.weight for case in cases]
    for config in CONFIGS:
        monkeypatch.setattr(gpu, "select", lambda *_, config=config: config)
        for rows in (7, 64, 300, 600):
            x = draw(rows, 1088, seed=6, dtype=dtype)
            program = gpu.bind(x, rows, weights, "auto")
            assert len(program.steps) == 2 + 2 * any(ranks)
            for case, y in zip(cases, program(x, rows, weights), strict=True):
                assert_near(y, case.expected(x), dtype)
                if case.A is None:  # x A^T of several may be summed in another order
                    assert torch.equal(y, product(case, rows, config, x))


@pytest.mark.parametrize("outs", [(4096, 1024, 1024), (1536, 1536), (14336, 14336)])
@pytest.mark.parametrize("rows", [8, 64, 128, 600])
def test_groups_of_layers(outs: tuple[int, ...], rows: int) -> None:
    cases = [problem(out, 4096, "2:4", 64, dtype=torch.bfloat16) for out in outs]
    x, weights = draw(rows, 4096, seed=6, dtype=torch.bfloat16), [case.weight for case in cases]
    with torch.no_grad():
        ys = packed_linears(x, weights)
        for case, y in zip(cases, ys, strict=True):
            assert_near(y, case.expected(x), torch.bfloat16)


def test_weights_that_share_x_have_blocks_by_all_their_rows() -> None:
    device = torch.device(DEVICE)
    layers = [bench.random_layer((out, 4096), parse("2:4"), 64, torch.bfloat16, device) for out in (4096, 1024, 1024)]
    weights = [layer.packed_weight for layer in layers]
    for rows in (12, 30, 100, 300):
        x = draw(rows, 4096, seed=6, dtype=torch.bfloat16)
        program = gpu.bind(x, rows, weights, "auto")
        assert len(program.steps) == 2  # x A^T of all, and the products
        for y, layer in zip(program(x, rows, weights), layers, strict=True):
            assert_near(y, x.double() @ layer.to_dense().weight.double().T, torch.bfloat16)
        other = draw(rows + 1, 4096, seed=7, dtype=torch.bfloat16)  # the same configuration for a power of two
        assert gpu.select(other, rows + 1, weights[0], "auto") == gpu.select(x, rows, weights[0], "auto")
