"""The product with a hierarchical matrix against the dense one, and its gradients."""

import dataclasses

import pytest
import torch
from helpers.hierarchies import SHAPES, by_entries, random_hierarchy
from helpers.layer_problems import randn

from hf_sparselr.format.hierarchy import Hierarchy, HierarchyShape
from hf_sparselr.kernels.hierarchy import hierarchical_product, multiply_few
from hf_sparselr.utils.availability import TRITON


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dense_product(shape, permuted: bool) -> None:
    hierarchy = random_hierarchy(shape, permuted)
    dense = by_entries(hierarchy)
    for sizes in ((), (1,), (3, 5), (0,)):
        x = randn(*sizes, shape.in_features, seed=9)
        torch.testing.assert_close(hierarchical_product(x, hierarchy), x @ dense.T)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, HierarchyShape(24, 600, (9, 4))], ids=str)
def test_the_kernels_for_few_rows(shape, permuted: bool, rows: int) -> None:
    """Compiled on a GPU, else by Triton's interpreter (see conftest)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hierarchy = random_hierarchy(shape, permuted, torch.float32)
    x, base = randn(rows, shape.in_features, seed=9).float(), randn(rows, shape.out_features, seed=8).float()
    expected = x @ by_entries(hierarchy).T
    there = on(hierarchy, device)
    y = multiply_few(x.to(device), there)
    torch.testing.assert_close(y.cpu(), expected, atol=1e-4, rtol=1e-4)
    y = multiply_few(x.to(device), there, base.to(device))
    torch.testing.assert_close(y.cpu(), expected + base, atol=1e-4, rtol=1e-4)


def on(hierarchy: Hierarchy, device: str, dtype: torch.dtype | None = None) -> Hierarchy:
    moved = {
        field.name: value.to(device, dtype if value.is_floating_point() else None)
        for field in dataclasses.fields(hierarchy)
        if isinstance(value := getattr(hierarchy, field.name), torch.Tensor)
    }
    return dataclasses.replace(hierarchy, **moved)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 16, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gpu_agrees_with_the_cpu(dtype: torch.dtype, rows: int) -> None:
    shape = HierarchyShape(1000, 1536, (64, 32, 16, 8))
    hierarchy = random_hierarchy(shape, True)
    x, base = randn(rows, 1536, seed=9), randn(rows, 1000, seed=8)
    expected = base + hierarchical_product(x, hierarchy)
    y = hierarchical_product(x.to("cuda", dtype), on(hierarchy, "cuda", dtype), base.to("cuda", dtype))
    assert y.dtype == dtype
    assert float((y.cpu().double() - expected).norm() / expected.norm()) < 8 * torch.finfo(dtype).eps


@pytest.mark.gpu
def test_a_row_in_a_cuda_graph() -> None:
    hierarchy = on(random_hierarchy(HierarchyShape(512, 512, (16, 8)), True), "cuda", torch.bfloat16)
    x = torch.randn(1, 512, dtype=torch.bfloat16, device="cuda")
    expected = hierarchical_product(x, hierarchy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hierarchical_product(x, hierarchy)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("shape", [HierarchyShape(8, 12, (2, 1)), HierarchyShape(7, 9, (1,))], ids=str)
def test_gradients(shape, permuted: bool) -> None:
    hierarchy = random_hierarchy(shape, permuted)
    x = randn(2, shape.in_features, seed=9)

    def product(x, A, B, leaves):
        return hierarchical_product(x, dataclasses.replace(hierarchy, A=A, B=B, leaves=leaves))

    inputs = [t.requires_grad_() for t in (x, hierarchy.A, hierarchy.B, hierarchy.leaves)]
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)
    assert torch.autograd.gradcheck(
        lambda A, B, leaves: dataclasses.replace(hierarchy, A=A, B=B, leaves=leaves).dense(), inputs[1:]
    )


def test_a_cpu_without_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is then that of FP32, rounded once."""
    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", {torch.bfloat16})
    wide = random_hierarchy(SHAPES[0], True, torch.float32)
    parts = {part: getattr(wide, part).bfloat16() for part in ("A", "B", "leaves")}
    x, half = randn(4, 64, seed=9).bfloat16(), dataclasses.replace(wide, **parts)
    exact = dataclasses.replace(wide, **{part: tensor.float() for part, tensor in parts.items()})
    assert torch.equal(hierarchical_product(x, half), hierarchical_product(x.float(), exact).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    hierarchy = random_hierarchy(SHAPES[0], True)
    half = dataclasses.replace(hierarchy, **{part: getattr(hierarchy, part).to(dtype) for part in ("A", "B", "leaves")})
    x = randn(4, 64, seed=9)
    exact, y = x @ by_entries(hierarchy).T, hierarchical_product(x.to(dtype), half)
    assert y.dtype == dtype
    assert float((y.double() - exact).norm() / exact.norm()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("emulated", [set(), {torch.bfloat16}])
def test_follows_autocast(emulated: set, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", emulated)
    hierarchy = random_hierarchy(SHAPES[0], True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert hierarchical_product(randn(4, 64).float(), hierarchy).dtype == torch.bfloat16


def test_compiles_without_a_break() -> None:
    hierarchy = random_hierarchy(SHAPES[2], True, torch.float32)
    compiled = torch.compile(lambda x: hierarchical_product(x, hierarchy), fullgraph=True, backend="eager")
    x = randn(3, 53).float()
    torch.testing.assert_close(compiled(x), hierarchical_product(x, hierarchy))
