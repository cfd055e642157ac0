"""Two processes against one: the same windows, the same layers, the same model. Gloo, on the CPU."""

import contextlib
import io
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.paths import ROOT
from helpers.streamed import content
from helpers.subprocesses import fork

import hf_sparselr
from hf_sparselr import cli
from hf_sparselr.compression import layer_solving
from hf_sparselr.compression.distributed import check_placement, even_batch, joined, spread
from hf_sparselr.format.patterns import NM, Unstructured
from hf_sparselr.solvers.gram import ScaledGram
from hf_sparselr.solvers.registry import METHODS
from hf_sparselr.solvers.threebasil import Options
from hf_sparselr.utils.world import ALONE, World

pytestmark = pytest.mark.xdist_group("distributed")  # they share what their fixture makes

IDS = torch.randint(3, tiny.VOCAB, (10, 32), generator=torch.Generator().manual_seed(1))
DATA = {"calibration": IDS, "num_samples": len(IDS)}
TM = {"refine": "tm", "tm": {"passes": 2, "batch_size": 4}}
RUNS: dict[str, tuple[str, dict]] = {
    "tm": ("llama", {"method": "wanda", "method_options": {}, "rank": 0, "sparsity": 0.5, **DATA, **TM}),
    "experts": ("mixtral", {"method": "sparsegpt", "method_options": {}, "rank": 0, **DATA}),
    "hierarchy": ("llama", {"method": "svd", "method_options": {}, "sparsity": None, "low_rank": "hss", "rank": 2}),
    "few windows": ("llama", {"method": "magnitude", "method_options": {}, "rank": 0, "batch_size": 4, **TM}),
    "allocation": ("llama", {"allocation": "owl", "sparsity": 0.5, "method": "wanda", "method_options": {}, "rank": 0}),
}
SETTINGS = ("name", "shape", "pattern", "rank")
COMMAND = ["--method", "magnitude", "--rank", "0", "--refine", "none"]
COMMAND += ["--calibration", "self", "--num-samples", "4", "--seq-len", "8"]
GROUPS = 4  # of layers with a common input, in a block
PATTERNS = {"2:4": NM(2, 4), "50%": Unstructured(0.5)}


def compressed(name: str, distributed: bool) -> tuple[dict, list, list]:
    kind, options = RUNS[name]
    model = hf_sparselr.compress(tiny.build(kind), tiny.settings(**options), distributed=distributed)
    report = model.sparselr_report
    return model.state_dict(), report.layers, [block["tm"] for block in report.blocks]


def solved(pattern: str, world: World | None) -> list[dict]:
    """3BASiL on layers of 7 and 24 rows, which two processes do not share evenly."""
    generator = torch.Generator().manual_seed(0)
    inputs, *weights = (torch.randn(rows, 16, generator=generator) for rows in (200, 7, 24))
    gram = ScaledGram(inputs.T @ inputs)
    options = Options(min_iterations=15, max_iterations=15)
    arguments = weights, gram, [PATTERNS[pattern]] * 2, [2, 3], options, 0
    results = METHODS["3basil"].solve_group(*arguments, world)
    return [{"S": r.S, "mask": r.mask, "A": r.A, "B": r.B, "objective": r.stats["objective"]} for r in results]


def work(folder: Path) -> None:
    with joined() as world:
        results = {pattern: solved(pattern, world) for pattern in PATTERNS}
        results |= {name: compressed(name, True) for name in RUNS}
        again = compressed("tm", True)[0]
        for stream in (True, False):
            name, options = str(folder / "dense"), RUNS["tm"][1]
            hf_sparselr.compress(name, tiny.settings(**options), folder / f"stream-{stream}", True, stream=stream)
        torch.save((results, again), folder / f"{world.rank}.pt")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert cli.main(["compress", str(folder / "dense"), "--output", str(folder / "out"), *COMMAND]) == 0
        (folder / f"{world.rank}.txt").write_text(printed.getvalue())


def die(folder: Path) -> None:
    """The second process is killed while layers of the second block are solved."""
    solve, rank, calls = layer_solving._decompose, os.environ["RANK"], []

    def killed(*arguments: object) -> object:
        calls.append(1)
        if rank == "1" and len(calls) > GROUPS:
            os.kill(os.getpid(), signal.SIGKILL)
        return solve(*arguments)

    layer_solving._decompose = killed
    go_on(folder)


def go_on(folder: Path) -> None:
    kind, options = RUNS["tm"]
    model = hf_sparselr.compress(tiny.build(kind), tiny.settings(**options), folder / "stopped", distributed=True)
    torch.save(model.state_dict(), folder / f"finished-{os.environ['RANK']}.pt")


def processes(work: Callable[[Path], None], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_process, (work, port, folder), nprocs=2, start_method="fork")


def _process(rank: int, work: Callable[[Path], None], port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in address.items()})
    work(folder)


def run(name: str, folder: Path):
    paths = [str(path) for path in (ROOT, ROOT / "tests", Path(__file__).parent)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    code = f"import test_distributed as t; t.processes(t.{name}, t.Path({str(folder)!r}))"
    return fork(code, environment, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny.build("llama").save_pretrained(folder / "dense")
    result = run("work", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def of_process(folder: Path, rank: int) -> tuple[dict, dict]:
    return torch.load(folder / f"{rank}.pt", weights_only=False)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_a_layer_are_solved_in_two_processes(folder: Path, pattern: str) -> None:
    (first, _), (second, _) = of_process(folder, 0), of_process(folder, 1)
    for expected, mine, other in zip(solved(pattern, None), first[pattern], second[pattern], strict=True):
        assert mine.pop("objective") == other.pop("objective") == pytest.approx(expected.pop("objective"), rel=1e-3)
        assert tiny.same(mine, other)
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(folder: Path, name: str) -> None:
    (first, _), (second, _) = of_process(folder, 0), of_process(folder, 1)
    (state, layers, matching), (mine, own_layers, own_matching) = compressed(name, False), first[name]
    assert tiny.same(mine, second[name][0])
    assert mine.keys() == state.keys()
    torch.testing.assert_close(mine, state, rtol=1e-3, atol=1e-5)
    for one, two in zip(layers, own_layers, strict=True):
        assert [one[key] for key in SETTINGS] == [two[key] for key in SETTINGS]
        assert two["relative_error"] == pytest.approx(one["relative_error"], rel=1e-4)
    for one, two in zip(matching, own_matching, strict=True):
        for key in ("loss_before", "loss_after") if one else ():
            assert two[key] == pytest.approx(one[key], rel=1e-3)


def test_a_second_run_gives_the_same_bits(folder: Path) -> None:
    results, again = of_process(folder, 0)
    assert tiny.same(results["tm"][0], again)


def test_the_first_process_writes_and_prints(folder: Path) -> None:
    assert "written to" in (folder / "0.txt").read_text() and not (folder / "1.txt").read_text()
    assert (folder / "out" / "model.safetensors").is_file()


def test_two_processes_stream(folder: Path) -> None:
    assert content(folder / "stream-True") == content(folder / "stream-False")


def test_a_run_ends_with_a_process_that_dies_and_goes_on_later(folder: Path, tmp_path: Path) -> None:
    result = run("die", tmp_path)
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr or "Connection closed by peer" in result.stderr
    assert not (tmp_path / "stopped" / "config.json").exists()
    assert len(list((tmp_path / "stopped" / ".sparselr-run").rglob("*.safetensors"))) == 1
    result = run("go_on", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    finished = of_process(folder, 0)[0]["tm"][0]
    assert all(tiny.same(torch.load(tmp_path / f"finished-{rank}.pt"), finished) for rank in (0, 1))


def test_3basil_shares_rows_in_its_fast_form() -> None:
    assert METHODS["3basil"].shares_rows(Options()) and not METHODS["3basil"].shares_rows(Options(form="textbook"))
    assert not METHODS["oats"].shares_rows(METHODS["oats"].options())


def test_batches_are_spread_in_turns() -> None:
    batches = [{"input_ids": torch.tensor([[n]])} for n in range(7)]
    shares = [spread(batches, 2, World(rank, 3)) for rank in range(3)]
    values = [[int(batch["input_ids"]) for batch in share] for share, _ in shares]
    assert values == [[0, 3, 5], [1, 4, 6], [2]] and [kept for _, kept in shares] == [1, 1, 0]


@pytest.mark.parametrize(
    ("size", "step", "processes", "expected"), [(8, 8, 1, 8), (8, 8, 4, 2), (4, 8, 3, 1), (2, 8, 4, 2)]
)
def test_batches_are_as_large_as_an_even_share(size: int, step: int, processes: int, expected: int) -> None:
    assert even_batch(size, step, World(0, processes)) == expected


def test_one_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device='cuda:1': each of several processes"):
        joined("cuda:1").__enter__()


def test_without_a_launcher_one_process_works_alone() -> None:
    with joined() as world:
        assert world is ALONE
    check_placement(tiny.build("llama"), World(0, 2))
