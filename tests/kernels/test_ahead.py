"""Kernels that are compiled while weights are read."""

import pytest
import torch
from helpers.kernel_cases import DEVICE
from torch import nn

from hf_sparselr.config.sparselr_config import SparseLRConfig
from hf_sparselr.format.bitmask import unpack_mask
from hf_sparselr.format.patterns import NM, Unstructured
from hf_sparselr.integrations.transformers import compiling
from hf_sparselr.kernels import ahead, cpu
from hf_sparselr.kernels.ahead import Kind, compile_ahead, stand_in
from hf_sparselr.nn.linear import SparseLRLinear

PAIRS = Kind(40, 128, NM(2, 4), 8, False, torch.bfloat16)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.7)])
@pytest.mark.parametrize(("rank", "bias"), [(0, True), (8, False)])
def test_a_stand_in_is_a_weight_of_its_kind(pattern: NM | Unstructured, rank: int, bias: bool) -> None:
    kind = Kind(1100, 96, pattern, rank, bias, torch.float16)
    weight = stand_in(kind, torch.device(DEVICE))
    weight.check()
    support = unpack_mask(weight.mask, kind.ins)
    assert support.shape == (1100, 96) and int(support.sum()) == weight.values.numel()
    assert weight.values.numel() == pytest.approx(pattern.kept((1100, 96)), rel=0.02)
    assert pattern.allows(support) or isinstance(pattern, Unstructured)
    assert (weight.rank, weight.bias is not None, weight.values.dtype) == (rank, bias, torch.float16)


def test_each_launch_of_a_model_is_made_once() -> None:
    other = PAIRS._replace(outs=80)
    tasks = list(dict.fromkeys(ahead._tasks([(other, PAIRS, PAIRS), (other,), (other, PAIRS, PAIRS)])))
    short, long = ahead.PROMPT, ahead.LONG_PROMPT
    one_row = [(1, (other, PAIRS, PAIRS)), (1, (other,)), (1, (other, PAIRS)), (1, (PAIRS,))]
    alone = [[(rows, (other,)), (rows, (PAIRS,))] for rows in (short, long)]
    assert tasks == [*alone[0], *one_row, *alone[1]]


def test_other_devices_and_dtypes_have_nothing_to_compile() -> None:
    assert compile_ahead([[PAIRS]], torch.device("meta")) == []
    assert compile_ahead([[PAIRS._replace(dtype=torch.float32)]], torch.device("cuda")) == []


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shapes = {"q": (32, 64, 1024), "k": (16, 64, 512), "v": (16, 64, 500), "down": (64, 32, 1024)}
        for name, (out, width, kept) in shapes.items():
            layer = SparseLRLinear(width, out, kept, 4, name == "q", device="meta", dtype=torch.bfloat16)
            self.add_module(name, layer)


@pytest.mark.parametrize("device_map", [{"": "cuda:1"}, {"lm_head": "cpu", "a": "disk", "b": 1}])
def test_kinds_are_those_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch, device_map: dict) -> None:
    asked: list = []
    monkeypatch.setattr(compiling, "compile_ahead", lambda *args: asked.append(args) or [])
    compiling.compile_kernels(Model(), SparseLRConfig(sparsity="2:4", rank=4), device_map)
    groups, device = asked.pop()
    assert device == torch.device("cuda", 1)
    assert [[(kind.outs, kind.bias) for kind in group] for group in groups] == [
        [(32, True), (16, False), (16, False)], [(64, False)],
    ]  # fmt: skip
    assert [str(kind.pattern) for kind in groups[0][:2]] == ["2:4"] * 2
    assert groups[0][2].pattern.kept((16, 64)) == 500  # another support than the configuration's


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"": torch.device("cpu")}])
def test_a_model_on_the_cpu_finds_its_kernels_compiled(
    monkeypatch: pytest.MonkeyPatch, device_map: dict | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu._library.cache_clear()
    for thread in compiling.compile_kernels(Model(), SparseLRConfig(sparsity="2:4", rank=4), device_map):
        thread.join()
    assert cpu._library.cache_info().currsize == 1
    cpu.supports(torch.bfloat16)
    assert cpu._library.cache_info().misses == 1


def test_a_model_that_may_go_to_a_gpu_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compiling.compile_kernels(Model(), SparseLRConfig(sparsity="2:4", rank=4), None) == []


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8)], ids=str)  # rows of one length, so that each draw is alike
def test_the_first_calls_compile_nothing(monkeypatch: pytest.MonkeyPatch, pattern: NM) -> None:
    from hf_sparselr.kernels import gpu, launch
    from hf_sparselr.kernels.cuda import nvrtc

    # Ranks that no other test has: kernels of this process are not compiled twice anyway.
    kinds = [Kind(out, 1024, pattern, 40, True, torch.bfloat16) for out in (1024, 512, 512)]
    for thread in compile_ahead([kinds], torch.device("cuda", torch.cuda.current_device())):
        thread.join()
    made = {kind: stand_in(kind, torch.device("cuda")) for kind in kinds}
    compiled: list = []
    real = nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", lambda *args: compiled.append(args[3:]) or real(*args))
    for rows in (1, ahead.PROMPT, ahead.LONG_PROMPT):
        for weights in [[made[kind] for kind in kinds]] if rows == 1 else [[made[kind]] for kind in kinds]:
            gpu.bind(weights[0].values, rows, weights, "auto", measures=False)
    assert compiled == []
    assert launch.drives()
