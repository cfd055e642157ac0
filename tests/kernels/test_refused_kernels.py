"""Kernels that NVRTC cannot compile, as an old one may: others take their place, which is said once."""

import logging

import pytest
import torch
from helpers.kernel_cases import CUDA, DEVICE, assert_near, draw, problem

pytest.importorskip("triton")

from hf_sparselr.bench.kernels import random_layer
from hf_sparselr.format.patterns import parse
from hf_sparselr.kernels import gpu
from hf_sparselr.kernels.cuda import experts as cuda_experts
from hf_sparselr.kernels.cuda import low_rank, nvrtc, vector, wgmma
from hf_sparselr.kernels.cuda.nvrtc import CompileError
from hf_sparselr.nn.packed_experts import ExpertStack


@pytest.fixture(autouse=True)
def _all_kernels_are_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_REFUSED", set())


@pytest.mark.skipif(CUDA, reason="a kernel that is refused for real: below")
def test_the_next_kernel_takes_its_place(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refuse(rows: int, weights: list, config: gpu.LaunchConfig) -> gpu.Program:
        tried.append(config.kernel)
        raise CompileError("small_batch.cu: unknown instruction")

    monkeypatch.setitem(gpu._BINDERS, "mma", refuse)
    monkeypatch.setattr(gpu.small_batch, "supports", lambda weight, index: True)
    monkeypatch.setattr(gpu, "measured", lambda *_: gpu.candidates(2, case.weight, False, True)[0])
    case = problem(5, 64, 0.5, dtype=torch.bfloat16)
    x = draw(2, 64, seed=6, dtype=torch.bfloat16)
    for _ in range(2):
        program = gpu.bind(x, 2, [case.weight], "packed")
        assert_near(program(x, 2, [case.weight])[0], case.expected(x), torch.bfloat16)
    assert tried == ["mma"]
    (said,) = caplog.records
    assert said.levelno == logging.WARNING and '"mma"' in said.message and "unknown instruction" in said.message


def test_what_no_kernel_can_do_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CompileError("nothing compiles")

    for name in gpu._BINDERS:
        monkeypatch.setitem(gpu._BINDERS, name, refuse)
    case = problem(5, 64, 0.5, dtype=torch.bfloat16)
    with pytest.raises(CompileError, match="nothing compiles"):
        gpu.bind(draw(1, 64, seed=6, dtype=torch.bfloat16), 1, [case.weight], "packed")


@pytest.mark.gpu(capability=(9, 0))
@pytest.mark.parametrize(
    ("kind", "rows", "kernel", "module"),
    [("2:4", 64, "wgmma", wgmma), ("2:4", 64, "wgmma", low_rank), (0.5, 2, "vector", vector)],
)
def test_a_source_that_nvrtc_refuses(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, kernel: str, module
) -> None:
    case = problem(1024, 1024, kind, 8, True, torch.bfloat16)
    x = draw(rows, 1024, seed=6, dtype=torch.bfloat16)
    assert gpu.select(x, rows, case.weight, "auto").kernel == kernel
    monkeypatch.setattr(module, "load_function", refused_source)
    program = gpu.bind(x, rows, [case.weight], "auto")
    assert_near(program(x, rows, [case.weight])[0], case.expected(x), torch.bfloat16)
    assert gpu.select(x, rows, case.weight, "auto").kernel != kernel
    assert [f'"{kernel}"' in record.message for record in caplog.records] == [True]


@pytest.mark.gpu
def test_experts_that_nvrtc_refuses_are_computed_one_by_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [random_layer((96, 128), parse("2:4"), 8, torch.bfloat16, torch.device(DEVICE), seed=n) for n in (0, 1)]
    stack = ExpertStack(layers, (2, 96, 128))
    monkeypatch.setattr(cuda_experts, "load_function", refused_source)
    x = draw(3, 128, seed=6, dtype=torch.bfloat16)
    with torch.no_grad():
        assert stack.table(x) is None and stack.table(x) is None
    assert ["experts" in record.message for record in caplog.records] == [True]


def refused_source(source: str, name: str, defines: tuple[str, ...], device: int, shared: int) -> int:
    broken = ("u32=?",) * (source != "low_rank.cu")  # which keeps what it finds for good
    return nvrtc.load_function(source, name, (*defines, *broken), device, shared)
