"""The kernels in Triton against float64: compiled on a GPU, else by Triton's interpreter (see conftest)."""

from pathlib import Path

import pytest
import torch
from helpers.kernel_cases import DEVICE, SUPPORTS, Problem, assert_near, draw, problem

pytest.importorskip("triton")

from hf_sparselr.kernels import autotune, gpu
from hf_sparselr.kernels.launch_config import BESIDE, JOINED, TILES, LaunchConfig, candidates
from hf_sparselr.kernels.measured import measured
from hf_sparselr.kernels.support_index import index_of
from hf_sparselr.kernels.triton.unpack import collect

# Few rows


def configs() -> list[LaunchConfig]:
    return [
        LaunchConfig("gemv", 2, 1), LaunchConfig("gemv", 4, 2),
        LaunchConfig("small_batch", 16, 1), LaunchConfig("small_batch", 16, 2, ahead=1),
        LaunchConfig("small_batch", 32, 1, split=2), LaunchConfig("small_batch", 16, 1, split=3, ahead=1),
    ]  # fmt: skip


def multiply(x: torch.Tensor, case: Problem, config: LaunchConfig) -> torch.Tensor:
    return gpu.run(len(x), [case.weight], config)(x, len(x), [case.weight])[0]


@pytest.mark.parametrize("config", configs(), ids=str)
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_few_rows(out: int, n: int, kind: str | float, config) -> None:
    dtype = torch.float32 if config.kernel == "gemv" else torch.bfloat16
    case = problem(out, n, kind, dtype=dtype)
    x = draw(2, n, seed=6, dtype=dtype)
    assert_near(multiply(x, case, config), case.expected(x), dtype)


@pytest.mark.parametrize("config", configs(), ids=str)
@pytest.mark.parametrize(
    ("rows", "rank", "bias"), [(1, 0, False), (3, 0, True), (3, 1, False), (9, 33, True), (16, 2, True)]
)
def test_few_rows_rows_ranks_and_bias(config, rows: int, rank: int, bias: bool) -> None:
    case = problem(3, 70, 0.5, rank, bias, torch.float16)
    x = draw(rows, 70, seed=6, dtype=torch.float16)
    assert_near(multiply(x, case, config), case.expected(x), torch.float16)


@pytest.mark.parametrize("config", configs()[1::2], ids=str)
def test_few_rows_at_rank_70(config) -> None:
    case = problem(3, 64, "2:4", 70, dtype=torch.bfloat16)
    x = draw(2, 64, seed=6, dtype=torch.bfloat16)
    assert_near(multiply(x, case, config), case.expected(x), torch.bfloat16)


@pytest.mark.parametrize("config", configs()[1::2], ids=str)
def test_few_rows_takes_values_at_any_address(config) -> None:
    case = problem(4, 64, "2:4", dtype=torch.bfloat16)
    storage = torch.cat([case.values[:1], case.values])
    case.values = storage[1:]  # not aligned to the words that 2:4 is read in
    assert case.values.data_ptr() % 8
    x = draw(1, 64, seed=6, dtype=torch.bfloat16)
    assert_near(multiply(x, case, config), case.expected(x), torch.bfloat16)


@pytest.mark.parametrize("kind", [0.5, "2:4"])
def test_one_large_entry_of_x_meets_only_its_column(kind: str | float) -> None:
    case = problem(4, 320, kind, 0, False, torch.bfloat16)
    x = torch.zeros(1, 320, dtype=torch.bfloat16, device=DEVICE)
    x[0, 37] = 2.0**100
    expected = case.S[:, 37].double() * 2.0**100
    assert torch.equal(multiply(x, case, LaunchConfig("small_batch", 16, 1))[0].double(), expected)


@pytest.mark.parametrize("config", configs(), ids=str)
@pytest.mark.parametrize("kind", [0.5, "2:4"])
def test_layers_share_a_launch(kind: str | float, config) -> None:
    dtype = torch.float32 if config.kernel == "gemv" else torch.bfloat16
    shapes = (config.rows + 2, 3), (3, 70), (1, 1)  # two programs, a long product with A, a single row
    cases = [problem(out, 128, kind, rank, dtype=dtype) for out, rank in shapes]
    x, weights = draw(2, 128, seed=6, dtype=dtype), [case.weight for case in cases]
    outs = gpu.run(2, weights, config)(x, 2, weights)
    for case, out in zip(cases, outs, strict=True):
        assert_near(out, case.expected(x), dtype)
        assert torch.equal(out, multiply(x, case, config))


def test_the_memory_of_layers_that_share_a_launch_is_aligned() -> None:
    weights = [problem(4, 64, 0.5, rank, dtype=torch.bfloat16).weight for rank in (3, 64, 2)]
    for config in (LaunchConfig("gemv", 2, 1), LaunchConfig("small_batch", 16, 1)):
        shared = [memory.fixed for memory in gpu.run(1, weights, config).memories if memory.shared]
        assert shared == [4, 64, 4]


def test_only_layers_that_are_alike_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, launches, real = torch.bfloat16, [], gpu.run
    monkeypatch.setattr(
        gpu, "run", lambda rows, weights, config: launches.append(len(weights)) or real(rows, weights, config)
    )
    cases = [
        problem(6, 64, 0.5, dtype=dtype),
        problem(6, 64, "2:4", dtype=dtype),
        problem(9, 64, 0.7, 1, dtype=dtype),  # as the first
        problem(6, 64, 0.5, 0, dtype=dtype),
        problem(6, 64, 0.5, bias=False, dtype=dtype),
        problem(7, 64, 0.6, dtype=dtype),  # but for its configuration
    ]
    warps = {9: (8, 4), 7: (2, 8)}  # the first of the same order as the others'
    monkeypatch.setattr(gpu, "known", lambda rows, w: LaunchConfig("gemv", *warps.get(w.out_features, (2, 4))))
    x, weights = draw(1, 64, seed=6, dtype=dtype), [case.weight for case in cases]
    outs = gpu.bind(x, 1, weights, "auto")(x, 1, weights)
    assert sorted(launches) == [1, 1, 1, 1, 2]
    for case, out in zip(cases, outs, strict=True):
        assert_near(out, case.expected(x), dtype)


# More rows


def medium(x: torch.Tensor, case: Problem, split: int) -> torch.Tensor:
    return multiply(x, case, LaunchConfig("medium_batch", 64, 4, split=split))


@pytest.mark.parametrize("split", [1, 2, 5])
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_medium_batch(out: int, n: int, kind: str | float, split: int) -> None:
    case = problem(out, n, kind, dtype=torch.bfloat16)
    x = draw(17, n, seed=6, dtype=torch.bfloat16)
    assert_near(medium(x, case, split), case.expected(x), torch.bfloat16)


@pytest.mark.parametrize("kind", [0.5, "2:4"])
@pytest.mark.parametrize(("rows", "rank", "bias"), [(1, 0, False), (9, 33, True), (40, 64, False), (130, 70, True)])
def test_medium_batch_of_many_rows_ranks_and_bias(kind: str | float, rows: int, rank: int, bias: bool) -> None:
    case = problem(70, 320, kind, rank, bias, torch.float16)
    x = draw(rows, 320, seed=6, dtype=torch.float16)
    for split in (1, 3):
        assert_near(medium(x, case, split), case.expected(x), torch.float16)


@pytest.mark.parametrize("split", [1, 2])
def test_a_medium_batch_serves_other_numbers_of_rows(split: int) -> None:
    case = problem(70, 320, 0.5, 8, dtype=torch.bfloat16)
    product = gpu.run(33, [case.weight], LaunchConfig("medium_batch", 64, 4, split=split))
    for rows in (64, 33, 50):
        x = draw(rows, 320, seed=6, dtype=torch.bfloat16)
        assert_near(product(x, rows, [case.weight])[0], case.expected(x), torch.bfloat16)


@pytest.mark.parametrize("kind", [0.5, "2:4"])
def test_medium_batch_takes_values_at_any_address(kind: str | float) -> None:
    case = problem(4, 64, kind, dtype=torch.bfloat16)
    case.values = torch.cat([case.values[:1], case.values])[1:]
    assert case.values.data_ptr() % 8
    x = draw(20, 64, seed=6, dtype=torch.bfloat16)
    assert_near(medium(x, case, 1), case.expected(x), torch.bfloat16)


# Unpacking, and back


@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
@pytest.mark.parametrize("rank", [0, 3])
def test_densify(out: int, n: int, kind: str | float, rank: int) -> None:
    case = problem(out, n, kind, rank)
    dense = gpu.densify(case.weight)
    assert_near(dense, case.dense, torch.float32)
    if rank == 0:
        assert torch.equal(dense.double(), case.S)
    assert torch.equal(collect(case.mask, index_of(case.mask, n), dense), dense[case.support])


@pytest.mark.parametrize(("out", "n", "kind"), [(20, 130, 0.5), (5, 320, "2:4")])
@pytest.mark.parametrize("rank", [0, 80])
def test_densify_in_16_bits(out: int, n: int, kind: str | float, rank: int) -> None:
    case = problem(out, n, kind, rank, dtype=torch.bfloat16)
    assert_near(gpu.densify(case.weight), case.dense, torch.bfloat16)


# The choice


@pytest.mark.parametrize(("rows", "dtype", "kernels"), [
    (1, torch.float32, {"gemv", "unpack_then_gemm"}), (16, torch.float32, {"gemv", "unpack_then_gemm"}),
    (17, torch.float32, {"unpack_then_gemm"}), (1, torch.bfloat16, {"gemv"}), (16, torch.bfloat16, {"small_batch"}),
    (17, torch.bfloat16, {"medium_batch", "unpack_then_gemm"}), (300, torch.bfloat16, {"unpack_then_gemm"}),
])  # fmt: skip
def test_all_that_is_worth_trying_gives_the_product(rows: int, dtype: torch.dtype, kernels: set[str]) -> None:
    x = draw(rows, 24, seed=6, dtype=dtype)
    for rank, bias in ((1, True), (0, False)):
        case = problem(2, 24, 0.5, rank, bias, dtype)
        configs = candidates(rows, case.weight, pairs=False, native=False)
        for config in configs:
            assert_near(multiply(x, case, config), case.expected(x), dtype)
        assert {config.kernel for config in configs} == kernels
        assert BESIDE not in configs or rank > 0


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 256, 257, 10**6])
@pytest.mark.parametrize("kind", ["2:4", 0.5])
@pytest.mark.parametrize("native", [True, False])
def test_there_is_a_kernel_for_every_number_of_rows(rows: int, kind: str | float, native: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = problem(4, 64, kind, dtype=dtype).weight
        for config in candidates(rows, weight, pairs=kind == "2:4", native=native):
            most = {"gemv": 16, "small_batch": 16, "mma": 32, "medium_batch": 256, "tiles": 256}.get(
                config.kernel, rows
            )
            assert rows <= most and (native or config.kernel not in ("mma", "tiles"))


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_what_is_known_is_taken(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = problem(3, 24, 0.5, 1, dtype=torch.bfloat16).weight
    monkeypatch.setattr(gpu, "known", lambda *given: BESIDE)
    monkeypatch.setattr(gpu, "choose", lambda *given: pytest.fail("measured again"))
    x = draw(rows, 24, seed=6, dtype=torch.bfloat16)
    assert gpu.select(x, rows, weight, "auto") == BESIDE
    packed = {"gemv"} if rows == 1 else {"small_batch"} if rows <= 16 else {BESIDE.kernel}
    assert gpu.select(x, rows, weight, "packed").kernel in packed


@pytest.mark.parametrize(("number", "card"), [(99, "NVIDIA H100 80GB HBM3"), (98, "NVIDIA H200")])
@pytest.mark.parametrize("pairs", [True, False])
def test_measured_cards_have_a_kernel_for_every_number_of_rows(
    pairs: bool, number: int, card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    device = torch.device("cuda", number)
    for rows in (*range(1, 520), 1024, 1025, 8192, 10**6):
        for outs in (64, 16384):
            kernel = measured(rows, outs, pairs, device).kernel
            most = {"gemv": 16, "mma": 32, "tiles": 256, "medium_batch": 256}.get(kernel, rows)
            assert rows <= most and (pairs or kernel != "tiles")
    assert measured(1, 64, pairs, torch.device("cpu")) is None


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(autotune, "_file", lambda device: tmp_path / "table.json")
    autotune._table.cache_clear()
    yield tmp_path / "table.json"
    autotune._table.cache_clear()


def test_the_fastest_is_kept_on_disk(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = TILES[0]
    times = {JOINED: 0.5, tiles: 0.3, BESIDE: 0.29}  # of equal ones the first
    monkeypatch.setattr(autotune, "milliseconds", lambda run, device: times[run()])
    weight = problem(64, 64, "2:4", dtype=torch.bfloat16).weight
    assert autotune.choose(300, weight, list(times), lambda config: config) == tiles
    autotune._table.cache_clear()  # what follows is read from the file
    assert autotune.known(300, weight) == tiles and autotune.known(20, weight) is None


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"name": 1}', '{"name": {"speed": 2}}'])
def test_a_damaged_table_is_as_none(text: str, table: Path) -> None:
    table.write_text(text)
    assert autotune.known(1, problem(3, 24, 0.5).weight) is None
