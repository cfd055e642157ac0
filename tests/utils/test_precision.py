"""The precision of matrix products, and what the user has set."""

import weakref

import pytest
import torch

from hf_sparselr.utils import precision
from hf_sparselr.utils.precision import (
    PRECISIONS,
    arithmetic,
    available,
    coarsest,
    matmuls,
    plain_modes,
    product,
    subtract_product,
)


def settings() -> tuple:
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:
        common = None
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return (common, *(backend.fp32_precision for backend in backends))


@pytest.fixture
def restored():
    with matmuls("highest"):
        yield


@pytest.mark.parametrize("user", ["nothing", "common", "one backend"])
@pytest.mark.parametrize(("precision", "inside"), [("fp32", "highest"), ("tf32", "high")])
def test_products_do_not_depend_on_what_the_user_has_set(user, precision, inside, restored) -> None:
    if user == "common":
        torch.set_float32_matmul_precision("medium")
    if user == "one backend":  # the newer way, after which there is no common name
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = settings()
    with arithmetic(torch.device("cpu"), precision):
        assert torch.get_float32_matmul_precision() == inside
    assert settings() == before
    with pytest.raises(ZeroDivisionError), arithmetic(torch.device("cpu"), precision):
        _ = 1 / 0
    assert settings() == before


@pytest.mark.parametrize(("emulated", "on_cpu"), [({torch.bfloat16}, "fp32"), (set(), "bf16")])
def test_a_cpu_without_bf16_takes_fp32(emulated, on_cpu, monkeypatch) -> None:
    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", emulated)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert available("bf16", cpu) == coarsest(cpu) == on_cpu
    assert available("bf16", cuda) == coarsest(cuda) == "bf16"
    assert available("tf32", cpu) == "tf32" and available("fp32", cpu) == "fp32"
    assert coarsest(torch.device("mps")) == "fp32"


@pytest.mark.parametrize("missing", ["AVX-512", "oneDNN"])
def test_16_bits_are_emulated_without_what_torch_needs_for_them(missing: str, monkeypatch) -> None:
    if missing == "AVX-512":
        monkeypatch.setattr(precision, "X86", True)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:  # as on a Mac
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision._emulated_dtypes() == {torch.bfloat16, torch.float16}


def test_bf16_is_autocast() -> None:
    with arithmetic(torch.device("cpu"), "bf16"):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_round_their_factors_only(precision: str) -> None:
    left, right = (torch.randint(-100, 101, shape, dtype=torch.float32) for shape in ((40, 96), (96, 24)))
    exact = (left.double() @ right.double()).float()  # within 24 bits
    assert torch.equal(product(left, right, precision), exact)
    total = torch.ones(40, 24)
    assert subtract_product(total, left, right, precision) is total and torch.equal(total, 1 - exact)
    left, right = left / 7, right / 9
    error = (product(left, right, precision) - left @ right).norm() / (left @ right).norm()
    assert error < (2.0**-8 if precision == "bf16" else 1e-6)


def test_weights_do_not_outlive_their_products_in_bf16() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    alive = weakref.ref(weight)
    with plain_modes(torch.device("cpu")):
        with arithmetic(torch.device("cpu"), "bf16"):
            torch.nn.functional.linear(torch.randn(2, 4), weight)
        del weight
        assert alive() is None
