"""The product for any support on the tensor cores of compute capability 9.0 (`cuda/bitmask.cu`)."""

import pytest
import torch
from helpers.kernel_cases import DEVICE, Problem, assert_near, draw, problem

from hf_sparselr.bench import kernels as bench
from hf_sparselr.format.patterns import parse
from hf_sparselr.kernels import gpu
from hf_sparselr.kernels.cuda.bitmask import supports_bitmask
from hf_sparselr.kernels.launch_config import LaunchConfig

pytestmark = pytest.mark.gpu(capability=(9, 0))

FEW = [
    LaunchConfig("bitmask", rows, warps, split=split, resident=resident)
    for rows, warps, split, resident in ((64, 8, 1, 2), (64, 16, 4, 1), (64, 4, 8, 3), (128, 8, 2, 1))
]
MANY = [
    LaunchConfig("bitmask", rows, warps, split=split, cluster=cluster)
    for rows, warps, split, cluster in ((64, 4, 1, 1), (64, 4, 4, 2), (128, 8, 1, 1), (128, 8, 1, 2), (128, 8, 2, 1))
]
CASES = [  # odd sizes, empty and full rows, rows of S within a block and beyond, columns within a part and beyond
    (9, 104, 0.5), (33, 1096, 0.6), (5, 128, "empty rows"), (3, 72, "full"), (40, 512, "4:8"), (300, 1088, 0.9),
    (129, 8, 0.5), (70, 320, "2:4"),
]  # fmt: skip


def product(case: Problem, rows: int, config: LaunchConfig, x: torch.Tensor) -> torch.Tensor:
    return gpu.run(rows, [case.weight], config)(x, rows, [case.weight])[0]


@pytest.mark.parametrize("config", FEW + MANY, ids=str)
@pytest.mark.parametrize(("out", "n", "kind"), CASES)
def test_every_configuration(out: int, n: int, kind: str | float, config: LaunchConfig) -> None:
    number = CASES.index((out, n, kind)) + (FEW + MANY).index(config)
    rank, bias = ((0, True), (3, False), (72, True), (64, False))[number % 4]
    dtype = (torch.bfloat16, torch.float16)[number // 4 % 2]
    case = problem(out, n, kind, rank, bias, dtype)
    assert supports_bitmask(case.weight)
    for rows in ((1, 2, 7, 16), (17, 64, 130, 300))[config in MANY][number % 2 :: 2]:
        x = draw(rows, n, seed=6, dtype=dtype)
        assert_near(product(case, rows, config, x), case.expected(x), dtype)


@pytest.mark.parametrize("config", FEW + MANY, ids=str)
def test_each_column_meets_its_value(config: LaunchConfig) -> None:
    case, rows = problem(200, 320, 0.5, 0, False, torch.bfloat16), 16 if config in FEW else 64
    for first in range(0, 320, rows):
        x = torch.zeros(rows, 320, dtype=torch.bfloat16, device=DEVICE)
        x[torch.arange(rows), first + torch.arange(rows)] = 1
        out = product(case, rows, config, x)
        assert torch.equal(out.double(), case.S[:, first : first + rows].T)


@pytest.mark.parametrize("config", FEW + MANY, ids=str)
def test_rows_of_x_do_not_meet(config: LaunchConfig) -> None:
    case, rows = problem(72, 256, 0.5, 8, True, torch.bfloat16), 13 if config in FEW else 300
    x = draw(rows, 256, seed=6, dtype=torch.bfloat16)
    expected = product(case, rows, config, x)
    for row in (0, rows // 2, rows - 1):
        spoilt = x.clone()
        spoilt[row] = float("nan")
        out = product(case, rows, config, spoilt)
        assert out[row].isnan().all()
        out[row] = expected[row]
        assert torch.equal(out, expected)


@pytest.mark.parametrize("config", MANY, ids=str)
def test_one_program_serves_other_numbers_of_rows(config: LaunchConfig) -> None:
    case = problem(70, 1088, 0.5, 8, dtype=torch.bfloat16)
    program = gpu.run(64, [case.weight], config)
    for rows in (64, 33, 50):
        x = draw(rows, 1088, seed=6, dtype=torch.bfloat16)
        assert_near(program(x, rows, [case.weight])[0], case.expected(x), torch.bfloat16)


@pytest.mark.parametrize("config", FEW + MANY, ids=str)
def test_nothing_is_read_that_is_not_there(config: LaunchConfig) -> None:
    """Whatever comes out of a mask that was edited behind torch's back (run this under compute-sanitizer)."""
    rows = 5 if config in FEW else 40
    case = problem(70, 1088, 0.5, 8, dtype=torch.bfloat16)
    weights, x = [case.weight], draw(rows, 1088, seed=6, dtype=torch.bfloat16)
    program = gpu.run(rows, weights, config)
    case.mask.data.fill_(255)
    program(x, rows, weights)
    case.mask.data.random_(0, 256)
    program(x, rows, weights)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("out", "n"), [(14336, 4096), (4096, 14336), (4104, 4104)])
@pytest.mark.parametrize("kind", [0.5, 0.7])
@pytest.mark.parametrize("rows", [9, 16, 17, 64, 100, 200])
def test_large_layers(out: int, n: int, kind: float, rows: int) -> None:
    layer = bench.random_layer((out, n), parse(kind), 64, torch.bfloat16, torch.device(DEVICE))
    weight, x = layer.packed_weight, draw(rows, n, seed=6, dtype=torch.bfloat16)
    assert gpu.select(x, rows, weight, "auto").kernel == "bitmask"
    assert_near(layer(x), x.double() @ layer.to_dense().weight.double().T, torch.bfloat16)


def test_in_a_graph() -> None:
    case = problem(200, 512, 0.5, dtype=torch.bfloat16)
    for rows in (1, 16, 64):
        x, weights = draw(rows, 512, seed=6, dtype=torch.bfloat16), [case.weight]
        program, graph = gpu.run(rows, weights, FEW[0] if rows <= 16 else MANY[0]), torch.cuda.CUDAGraph()
        expected = program(x, rows, weights)[0]
        with torch.cuda.graph(graph):
            out = program(x, rows, weights)[0]
        graph.replay()
        assert torch.equal(out, expected)
