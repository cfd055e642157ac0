"""The product for up to four rows of x and any support on compute capability 9.0 (`cuda/vector.cu`)."""

import pytest
import torch
from helpers.kernel_cases import DEVICE, Problem, assert_near, draw, problem

from hf_sparselr.bench import kernels as bench
from hf_sparselr.format.patterns import parse
from hf_sparselr.kernels import gpu
from hf_sparselr.kernels.launch_config import LaunchConfig

pytestmark = pytest.mark.gpu(capability=(9, 0))

CONFIGS = [LaunchConfig("vector", 0, warps, ahead=ahead) for warps, ahead in ((16, 2), (8, 3), (2, 4), (1, 2))]
CASES = [  # odd sizes, empty and full rows, columns within a slice and beyond
    (9, 104, 0.5), (33, 1096, 0.6), (5, 128, "empty rows"), (3, 72, "full"), (40, 512, "4:8"), (300, 2112, 0.9),
    (37, 3208, 0.3), (129, 8, 0.5), (70, 320, "2:4"),
]  # fmt: skip


def product(case: Problem, rows: int, config: LaunchConfig, x: torch.Tensor) -> torch.Tensor:
    return gpu.run(rows, [case.weight], config)(x, rows, [case.weight])[0]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("out", "n", "kind"), CASES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_every_configuration(out: int, n: int, kind: str | float, rows: int, config: LaunchConfig) -> None:
    number = CASES.index((out, n, kind)) + CONFIGS.index(config) + rows
    rank, bias = ((0, True), (3, False), (72, True), (64, False))[number % 4]
    dtype = (torch.bfloat16, torch.float16)[number // 4 % 2]
    case = problem(out, n, kind, rank, bias, dtype)
    x = draw(rows, n, seed=6, dtype=dtype)
    assert_near(product(case, rows, config, x), case.expected(x), dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_each_column_meets_its_value(config: LaunchConfig) -> None:
    case = problem(200, 320, 0.5, 0, False, torch.bfloat16)
    for first in range(0, 320, 4):
        x = torch.zeros(4, 320, dtype=torch.bfloat16, device=DEVICE)
        x[torch.arange(4), first + torch.arange(4)] = 1
        assert torch.equal(product(case, 4, config, x).double(), case.S[:, first : first + 4].T)


def test_rows_of_x_do_not_meet() -> None:
    case = problem(72, 256, 0.5, 8, True, torch.bfloat16)
    x = draw(3, 256, seed=6, dtype=torch.bfloat16)
    expected = product(case, 3, CONFIGS[0], x)
    for row in range(3):
        spoilt = x.clone()
        spoilt[row] = float("nan")
        out = product(case, 3, CONFIGS[0], spoilt)
        assert out[row].isnan().all()
        out[row] = expected[row]
        assert torch.equal(out, expected)


@pytest.mark.parametrize("rank", [0, 8, 5])
def test_weights_that_share_a_launch_come_out_as_alone(rank: int) -> None:
    cases = [problem(out, 1088, 0.5, rank, True, torch.bfloat16) for out in (300, 70, 9)]
    weights, x = [case.weight for case in cases], draw(2, 1088, seed=6, dtype=torch.bfloat16)
    for y, case in zip(gpu.run(2, weights, CONFIGS[0])(x, 2, weights), cases, strict=True):
        assert torch.equal(y, product(case, 2, CONFIGS[0], x))
        assert_near(y, case.expected(x), torch.bfloat16)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_nothing_is_read_that_is_not_there(config: LaunchConfig) -> None:
    """Whatever comes out of a mask that was edited behind torch's back (run this under compute-sanitizer)."""
    case = problem(70, 1088, 0.5, 8, dtype=torch.bfloat16)
    weights, x = [case.weight], draw(2, 1088, seed=6, dtype=torch.bfloat16)
    program = gpu.run(2, weights, config)
    case.mask.data.fill_(255)
    program(x, 2, weights)
    case.mask.data.random_(0, 256)
    program(x, 2, weights)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("out", "n"), [(14336, 4096), (4096, 14336), (4104, 4104), (1024, 4096)])
@pytest.mark.parametrize("kind", [0.5, 0.7])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_layers_of_models(out: int, n: int, kind: float, rows: int) -> None:
    layer = bench.random_layer((out, n), parse(kind), 64, torch.bfloat16, torch.device(DEVICE))
    x = draw(rows, n, seed=6, dtype=torch.bfloat16)
    chosen = gpu.select(x, rows, layer.packed_weight, "auto").kernel
    assert chosen == ("vector" if rows > 1 or out * n > 2**25 else "gemv")
    assert_near(layer(x), x.double() @ layer.to_dense().weight.double().T, torch.bfloat16)


def test_in_a_graph() -> None:
    case = problem(200, 512, 0.5, dtype=torch.bfloat16)
    x, weights = draw(1, 512, seed=6, dtype=torch.bfloat16), [case.weight]
    program, graph = gpu.run(1, weights, CONFIGS[0]), torch.cuda.CUDAGraph()
    expected = program(x, 1, weights)[0]
    with torch.cuda.graph(graph):
        out = program(x, 1, weights)[0]
    graph.replay()
    assert torch.equal(out, expected)
