"""The C kernels against float64, by each set of instructions, and against memory that holds what it should not."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.kernel_cases import SUPPORTS, Problem, assert_near, draw, problem
from torch._subclasses import FakeTensorMode

from hf_sparselr.format.bitmask import pack
from hf_sparselr.kernels import PackedWeight, cpu, packed_linear, packed_linears
from hf_sparselr.utils import c_compiler

pytestmark = pytest.mark.skipif(not cpu.supports(torch.float32), reason="needs a C compiler, on x86 AVX2")
_AMX = pytest.mark.skipif(cpu._level() < 2, reason="needs AMX")
levels = pytest.mark.parametrize("level", [0, 1, pytest.param(2, marks=_AMX)], ids=["AVX2", "AVX-512", "AMX"])


@pytest.fixture(autouse=True)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which instructions C may use; but for AMX, it asks the processor whether it has them, too."""
    level = getattr(request.node, "callspec", None) and request.node.callspec.params.get("level")
    if level is not None:
        monkeypatch.setattr(cpu, "_level", lambda: level)


def on_cpu(case: Problem) -> PackedWeight:
    weight = case.weight
    return PackedWeight(*(t if t is None else t.cpu() for t in weight[:5]), weight.in_features)


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_products(out: int, n: int, kind: str | float, dtype: torch.dtype, level: int) -> None:
    for rank, bias in ((0, False), (5, True), (16, False)):
        case = problem(out, n, kind, rank, bias, dtype)
        for rows in (1, 2, 9, 40):
            x = draw(rows, n, seed=6, dtype=dtype).cpu()
            assert_near(cpu.multiply(x, on_cpu(case)), case.expected(x.to(case.S.device)).cpu(), dtype)


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 4, 5, 6, 7, 8, 16, 17, 33, 64, 65, 300])
def test_every_number_of_rows(rows: int, dtype: torch.dtype, level: int) -> None:
    case = problem(130, 1100, 0.6, 130, True, dtype)  # more than one band, step and part of the factors
    x = draw(rows, 1100, seed=6, dtype=dtype).cpu()
    assert_near(cpu.multiply(x, on_cpu(case)), case.expected(x.to(case.S.device)).cpu(), dtype)


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_unpacking(out: int, n: int, kind: str | float, dtype: torch.dtype, level: int) -> None:
    case = problem(out, n, kind, dtype=dtype)
    assert torch.equal(cpu.unpack(on_cpu(case)).double(), case.S.cpu())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_as_torch_rounds(dtype: torch.dtype, rows: int) -> None:
    mask, values = pack(torch.ones(200, 1, dtype=dtype), torch.ones(200, 1, dtype=torch.bool))
    bias = torch.cat([draw(196, seed=7, dtype=dtype).cpu(), torch.tensor([0, torch.inf, -torch.inf, torch.nan])]).to(
        dtype
    )
    x = torch.full((rows, 1), 2.0**-9 + 2.0**-12, dtype=dtype)
    out = cpu.multiply(x, PackedWeight(mask, values, None, None, bias, 1))
    expected = (x.float() + bias.float()).to(dtype)
    assert torch.equal(out[:, :-1], expected[:, :-1]) and out[:, -1].isnan().all()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the compiler's command; what was compiled before is forgotten, and again afterwards."""

    def use(command: str) -> None:
        monkeypatch.setenv("CC", command)
        for cached in (cpu._library, c_compiler._warn):
            cached.cache_clear()

    yield use
    monkeypatch.undo()
    use(os.environ.get("CC", ""))


def test_without_a_compiler_products_stay_right_and_it_is_said_once(
    compiler: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    compiler("false")
    for dtype in (torch.float32, torch.bfloat16):
        case = problem(9, 100, 0.5, 5, True, dtype)
        for rows in (1, 40):
            x = draw(rows, 100, seed=6, dtype=dtype).cpu()
            assert_near(packed_linear(x, on_cpu(case)), case.expected(x.to(case.S.device)).cpu(), dtype)
        assert not cpu.supports(dtype)
    (record,) = caplog.records
    assert "several times slower" in record.getMessage() and "false returned 1" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vectors_of_other_processors(dtype: torch.dtype, compiler: Callable[[str], None]) -> None:
    compiler("cc -DPORTABLE")
    assert cpu.supports(dtype)
    for out, n, kind in SUPPORTS[:3]:
        case = problem(out, n, kind, 5, True, dtype)
        assert torch.equal(cpu.unpack(on_cpu(case)).double(), case.S.cpu())
        for rows in (1, 7, 12, 13, 30, 70):
            x = draw(rows, n, seed=6, dtype=dtype).cpu()
            assert_near(cpu.multiply(x, on_cpu(case)), case.expected(x.to(case.S.device)).cpu(), dtype)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs AVX512-BF16")
def test_tiles_in_an_emulation(compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(f"cc -include {Path(__file__).parents[1] / 'helpers' / 'emulated_tiles.h'}")
    monkeypatch.setattr(cpu, "_level", lambda: 2)
    if not cpu._has_panels():
        pytest.skip("this compiler does not know AMX")
    for out, n, kind in SUPPORTS:
        for rank in (0, 5, 33):
            case = problem(out, n, kind, rank, rank > 0, torch.bfloat16)
            for rows in (9, 16, 17, 40, 65):
                x = draw(rows, n, seed=6, dtype=torch.bfloat16).cpu()
                assert_near(cpu.multiply(x, on_cpu(case)), case.expected(x.to(case.S.device)).cpu(), torch.bfloat16)
    weights = [on_cpu(problem(out, 100, 0.5, rank, True, torch.bfloat16)) for out, rank in ((9, 5), (33, 0), (70, 7))]
    x = draw(40, 100, seed=6, dtype=torch.bfloat16).cpu()
    together = packed_linears(x, weights)
    assert all(torch.equal(y, packed_linear(x, weight)) for y, weight in zip(together, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_with_one_input_come_out_as_they_would_alone(dtype: torch.dtype) -> None:
    kinds = ((9, 0.5, 5, True), (33, 0.9, 0, False), (50, 0.5, 7, True))
    weights = [on_cpu(problem(out, 100, kind, rank, bias, dtype)) for out, kind, rank, bias in kinds]
    for rows in (1, 40, 100):
        x = draw(rows, 100, seed=6, dtype=dtype).cpu()
        together = packed_linears(x, weights)
        assert all(torch.equal(y, packed_linear(x, weight)) for y, weight in zip(together, weights, strict=True))
    wrong = weights[1]._replace(values=torch.zeros(7, dtype=dtype))
    with pytest.raises(ValueError, match="values hold 7 entries"):
        packed_linears(x, [weights[0], wrong])


def test_weights_that_are_not_contiguous() -> None:
    case = problem(9, 100, 0.5, 5, True)
    weight = on_cpu(case)
    strided = weight._replace(A=weight.A.T.contiguous().T, B=torch.stack([weight.B] * 2, -1)[..., 0])
    assert not strided.A.is_contiguous() and not strided.B.is_contiguous()
    x = draw(3, 100, seed=6, dtype=torch.float32).cpu()
    assert torch.equal(packed_linear(x, strided), packed_linear(x, weight))
    assert torch.equal(packed_linear(x.T.contiguous().T, weight), packed_linear(x, weight))


def test_only_memory_of_the_cpu_is_given_to_c() -> None:
    weight = on_cpu(problem(6, 20, 0.5))
    assert cpu.takes((*weight.tensors, torch.nn.Parameter(weight.values)))
    assert not cpu.takes([weight.values.to("meta")])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not cpu.takes([mode.from_tensor(weight.values)])


@levels
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("change", [-1, 1, -60, 60])
def test_a_mask_that_does_not_fit_its_values_is_refused(rows: int, change: int, level: int) -> None:
    weight = on_cpu(problem(6, 200, 0.5))
    count = weight.values.numel() + change
    values = torch.zeros(count)
    x = draw(rows, 200, seed=6, dtype=torch.float32).cpu()
    wrong = weight._replace(values=values)
    with pytest.raises(ValueError, match=f"values hold {count} entries, but the mask keeps {count - change}"):
        cpu.multiply(x, wrong)
    with pytest.raises(ValueError, match=f"values hold {count} entries"):
        cpu.unpack(wrong)


@levels
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_bits_beyond_the_last_column_meet_zeros(rows: int, level: int) -> None:
    case = problem(3, 13, 0.5, 0, False)
    weight = on_cpu(case)
    mask = weight.mask.clone()
    mask[:, -1] |= 0xE0  # three more, of columns that are not there
    values = torch.full((weight.values.numel() + 9,), 7.0)
    out = cpu.multiply(draw(rows, 13, seed=6, dtype=torch.float32).cpu(), weight._replace(mask=mask, values=values))
    x = draw(rows, 13, seed=6, dtype=torch.float32).cpu().double()
    assert_near(out, 7 * x @ case.support.cpu().double().T, torch.float32)


def test_fp32_is_never_unpacked_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(cpu.prefers(torch.float32, rows) for rows in (1, 16, 17, 1000))
    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", {torch.bfloat16})
    assert all(cpu.prefers(torch.bfloat16, rows) for rows in (1, 16, 17, 1000))
    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", set())
    assert cpu.prefers(torch.bfloat16, 16) and not cpu.prefers(torch.float16, 17)
    for pairs in (True, False):
        monkeypatch.setattr(cpu, "_has_panels", lambda pairs=pairs: pairs)
        assert cpu.prefers(torch.bfloat16, 17) == pairs


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("train", ["inputs", "values"])
def test_training_in_16_bits_is_computed_in_fp32_where_the_cpu_has_no_instructions(
    train: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(70, 320, 0.5, dtype=torch.bfloat16)
    weight, products = on_cpu(case), []
    monkeypatch.setattr("hf_sparselr.utils.precision._EMULATED", {torch.bfloat16})
    real = torch.Tensor.__matmul__

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        products.append(real(left, right))
        return products[-1]

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    x = draw(9, 320, seed=6, dtype=torch.bfloat16).cpu().requires_grad_(train == "inputs")
    weight.values.requires_grad_(train == "values")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = packed_linear(x, weight)
    out.float().square().sum().backward()
    assert products and {product.dtype for product in products} == {torch.float32}
    S, y = case.S.cpu(), None
    exact = x.detach().double().requires_grad_()
    dense = (case.dense.cpu()).requires_grad_()
    y = torch.nn.functional.linear(exact, dense, weight.bias.double())
    y.square().sum().backward()
    expected = exact.grad if train == "inputs" else dense.grad[S != 0]
    actual = x.grad if train == "inputs" else weight.values.grad
    assert (actual.double() - expected).norm() <= 0.03 * expected.norm()


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "n", "kind"), [(5, 8, "2:4"), (33, 24, "4:8"), (40, 136, "1:2"), (16, 640, "2:4")])
def test_four_of_every_eight_columns(out: int, n: int, kind: str, dtype: torch.dtype, level: int) -> None:
    for rank, bias in ((0, False), (5, True), (16, False)):
        case = problem(out, n, kind, rank, bias, dtype)
        weight = on_cpu(case)
        for rows in (1, 2, 9):
            x = draw(rows, n, seed=6, dtype=dtype).cpu()
            assert_near(cpu.multiply(x, weight), case.expected(x.to(case.S.device)).cpu(), dtype)


@levels
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("row", [0, 1, 39])
def test_a_mask_that_only_seems_to_keep_four_of_every_eight_columns(row: int, rows: int, level: int) -> None:
    case = problem(40, 64, "2:4", 5, True)
    weight, support = on_cpu(case), case.support.cpu().clone()
    support[row] = torch.arange(64) < 32  # as many values, elsewhere
    mask, values = pack(draw(40, 64, seed=3, dtype=torch.float32).cpu() + 10.0, support)
    S = torch.zeros(40, 64).masked_scatter(support, values)
    x = draw(rows, 64, seed=6, dtype=torch.float32).cpu()
    out = cpu.multiply(x, weight._replace(mask=mask, values=values))
    expected = x.double() @ (S.double() + weight.B.double() @ weight.A.double()).T + weight.bias.double()
    assert_near(out, expected, torch.float32)
    mask[row, 0] = 0xFF  # and more bits than values
    mask[row, 1:4] = 0xFF
    mask[row, 4] = 1
    with pytest.raises(ValueError, match="values hold 1280 entries, but the mask keeps 1281"):
        cpu.multiply(x, weight._replace(mask=mask, values=values))
