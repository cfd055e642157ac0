"""The packed product against float64, on whatever this machine has: compiled on a GPU, else by Triton's interpreter
(see conftest)."""

import argparse
import copy
import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from helpers.kernel_cases import CUDA, DEVICE, SUPPORTS, Problem, assert_near, draw, layer_of, problem
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.bench import kernels as bench
from hf_sparselr.format.bitmask import pack
from hf_sparselr.kernels import cpu as native
from hf_sparselr.kernels import ops, packed_linear
from hf_sparselr.kernels import tensor_cache as resident
from hf_sparselr.kernels.support_index import build_index, index_of, row_starts
from hf_sparselr.nn.linear import SparseLRLinear

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton")
needs_native = pytest.mark.skipif(not native.supports(torch.float32), reason="needs AVX2 and a C compiler")

# The tables


@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_the_index_finds_every_value(out: int, n: int, kind: str | float) -> None:
    case = problem(out, n, kind)
    index = build_index(case.mask, n)
    support = F.pad(case.support, (0, -n % 64)).unflatten(1, (-1, 64))
    counts = support.sum(-1)
    before = counts.flatten().cumsum(0).view_as(counts) - counts
    assert index.nonzeros == case.values.numel() and index.shape == tuple(counts.shape)
    if index.per_block:
        assert (counts == index.per_block).all()
    else:
        assert torch.equal(index.starts[:, None] + index.offsets, before)
    assert index.pairs == (n % 64 == 0 and bool((support.unflatten(-1, (-1, 4)).sum(-1) == 2).all()))
    assert torch.equal(row_starts(case.mask), F.pad(case.support.sum(1).cumsum(0), (1, 0)))


@pytest.mark.parametrize("n", [40_000, 70_000])
def test_long_rows_wrap_no_offset(n: int) -> None:
    mask, _ = pack(torch.zeros(2, n, device=DEVICE), torch.ones(2, n, dtype=torch.bool, device=DEVICE))
    mask[0, 0] = 0xFE  # else every block would keep 64, and there would be no table
    offsets = build_index(mask, n).offsets.to(torch.int64)
    assert torch.equal(offsets[1] % 2**16 if n < 2**16 else offsets[1], torch.arange(0, n, 64, device=DEVICE))


def test_what_is_kept_follows_its_tensor() -> None:
    mask = problem(4, 64, 0.5).mask
    first = index_of(mask, 64)
    assert index_of(mask, 64) is first
    mask.zero_()
    assert index_of(mask, 64).nonzeros == 0 and index_of(mask.clone(), 64) is not index_of(mask, 64)
    kept = len(resident._KEPT)
    del mask, first
    index_of(problem(2, 64, 0.5).mask, 64)
    assert len(resident._KEPT) <= kept  # the tables of dead tensors are dropped


def test_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparselr.kernels.support_index._LIMIT", 3)
    with pytest.raises(ValueError, match="keeps 64 values"):
        build_index(problem(2, 64, 0.5).mask, 64)


# Decode


def plans() -> list:
    if not TRITON:
        return []
    from hf_sparselr.kernels.launch_config import Plan

    return [
        Plan("vector", 2, 1), Plan("vector", 4, 2),
        Plan("tiles", 16, 1), Plan("tiles", 16, 2, ahead=True),
        Plan("tiles", 32, 1, split=2), Plan("tiles", 16, 1, split=3, ahead=True),
    ]  # fmt: skip


def decode(x: torch.Tensor, case: Problem, plan) -> torch.Tensor:
    from hf_sparselr.kernels.triton.decode import decode

    return decode(x, [bundle(case, x.shape[1])], plan)[0]


def bundle(case: Problem, n: int):
    from hf_sparselr.kernels.triton.decode import Packed

    return Packed.of(*case.packed, case.bias, n)


@needs_triton
@pytest.mark.parametrize("plan", plans(), ids=str)
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_decode(out: int, n: int, kind: str | float, plan) -> None:
    dtype = torch.float32 if plan.form == "vector" else torch.bfloat16
    case = problem(out, n, kind, dtype=dtype)
    x = draw(2, n, seed=6, dtype=dtype)
    assert_near(decode(x, case, plan), case.expected(x), dtype)


@needs_triton
@pytest.mark.parametrize("plan", plans(), ids=str)
@pytest.mark.parametrize(
    ("rows", "rank", "bias"), [(1, 0, False), (3, 0, True), (3, 1, False), (9, 33, True), (16, 2, True)]
)
def test_decode_rows_ranks_and_bias(plan, rows: int, rank: int, bias: bool) -> None:
    case = problem(3, 70, 0.5, rank, bias, torch.float16)
    x = draw(rows, 70, seed=6, dtype=torch.float16)
    assert_near(decode(x, case, plan), case.expected(x), torch.float16)


@needs_triton
@pytest.mark.parametrize("plan", plans()[1::2], ids=str)
def test_decode_at_rank_70(plan) -> None:
    case = problem(3, 64, "2:4", 70, dtype=torch.bfloat16)
    x = draw(2, 64, seed=6, dtype=torch.bfloat16)
    assert_near(decode(x, case, plan), case.expected(x), torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("plan", plans()[1::2], ids=str)
def test_decode_takes_values_at_any_address(plan) -> None:
    case = problem(4, 64, "2:4", dtype=torch.bfloat16)
    storage = torch.cat([case.values[:1], case.values])
    case.values = storage[1:]  # not aligned to the words that 2:4 is read in
    assert case.values.data_ptr() % 8
    x = draw(1, 64, seed=6, dtype=torch.bfloat16)
    assert_near(decode(x, case, plan), case.expected(x), torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("kind", [0.5, "2:4"])
def test_one_large_entry_of_x_meets_only_its_column(kind: str | float) -> None:
    from hf_sparselr.kernels.launch_config import Plan

    case = problem(4, 320, kind, 0, False, torch.bfloat16)
    x = torch.zeros(1, 320, dtype=torch.bfloat16, device=DEVICE)
    x[0, 37] = 2.0**100
    expected = case.S[:, 37].double() * 2.0**100
    assert torch.equal(decode(x, case, Plan("tiles", 16, 1))[0].double(), expected)


@needs_triton
@pytest.mark.parametrize("plan", plans(), ids=str)
@pytest.mark.parametrize("kind", [0.5, "2:4"])
def test_layers_share_a_launch(kind: str | float, plan) -> None:
    from hf_sparselr.kernels.triton.decode import decode

    dtype = torch.float32 if plan.form == "vector" else torch.bfloat16
    cases = [problem(out, 192, kind, rank, dtype=dtype) for out, rank in ((40, 3), (5, 70), (1, 1), (17, 3))]
    x = draw(2, 192, seed=6, dtype=dtype)
    outs = decode(x, [bundle(case, 192) for case in cases], plan)
    for case, out in zip(cases, outs, strict=True):
        assert_near(out, case.expected(x), dtype)
        assert torch.equal(out, decode(x, [bundle(case, 192)], plan)[0])


@needs_triton
def test_only_layers_that_are_alike_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparselr.kernels.launch_config import Plan
    from hf_sparselr.kernels.triton import product as triton_product

    dtype, launches = torch.bfloat16, []
    real = triton_product.decode
    monkeypatch.setattr(
        triton_product,
        "decode",
        lambda x, layers, plan: launches.append(len(layers)) or real(x, layers, plan),
    )
    cases = [
        problem(6, 64, 0.5, dtype=dtype),
        problem(6, 64, "2:4", dtype=dtype),
        problem(9, 64, 0.7, 1, dtype=dtype),  # as the first
        problem(6, 64, 0.5, 0, dtype=dtype),
        problem(6, 64, 0.5, bias=False, dtype=dtype),
        problem(7, 64, 0.6, dtype=dtype),  # but for its plan
    ]
    layers = [bundle(case, 64) for case in cases]
    for layer in layers:
        layer.index.plans[1, layer.rank, dtype, False] = Plan("vector", 2, 4)
    layers[2].index.plans[1, 1, dtype, False] = Plan("vector", 8, 4)  # of the same order
    layers[5].index.plans[1, 3, dtype, False] = Plan("vector", 2, 8)
    x = draw(1, 64, seed=6, dtype=dtype)
    outs = triton_product.triton_product(x, layers, "auto")
    assert sorted(launches) == [1, 1, 1, 1, 2]
    for case, out in zip(cases, outs, strict=True):
        assert_near(out, case.expected(x), dtype)


# Blocks


def blocks(x: torch.Tensor, case: Problem, split: int) -> torch.Tensor:
    from hf_sparselr.kernels.launch_config import Plan
    from hf_sparselr.kernels.triton.medium_batch import multiply_blocks

    return multiply_blocks(x, bundle(case, x.shape[1]), Plan("blocks", 64, 4, split=split))


@needs_triton
@pytest.mark.parametrize("split", [1, 2, 5])
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_blocks(out: int, n: int, kind: str | float, split: int) -> None:
    case = problem(out, n, kind, dtype=torch.bfloat16)
    x = draw(17, n, seed=6, dtype=torch.bfloat16)
    assert_near(blocks(x, case, split), case.expected(x), torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("kind", [0.5, "2:4"])
@pytest.mark.parametrize(
    ("rows", "rank", "bias"), [(1, 0, False), (9, 33, True), (40, 64, False), (130, 70, True)]
)
def test_blocks_of_many_rows_ranks_and_bias(kind: str | float, rows: int, rank: int, bias: bool) -> None:
    case = problem(70, 320, kind, rank, bias, torch.float16)
    x = draw(rows, 320, seed=6, dtype=torch.float16)
    for split in (1, 3):
        assert_near(blocks(x, case, split), case.expected(x), torch.float16)


@needs_triton
@pytest.mark.parametrize("kind", [0.5, "2:4"])
def test_blocks_take_values_at_any_address(kind: str | float) -> None:
    case = problem(4, 64, kind, dtype=torch.bfloat16)
    case.values = torch.cat([case.values[:1], case.values])[1:]
    assert case.values.data_ptr() % 8
    x = draw(20, 64, seed=6, dtype=torch.bfloat16)
    assert_near(blocks(x, case, 1), case.expected(x), torch.bfloat16)


# The layout of the sparse tensor cores


def as_cusparselt_has_it(case: Problem, joined: bool) -> torch.Tensor:
    """By the description in `sparse_cores`, entry by entry."""
    parts = [case.S.to(case.values.dtype)]
    if joined:  # columns 0, 1 of four, then 2, 3, where x A^T is repeated
        keeps = torch.arange(case.B.shape[1], device=DEVICE) % 4 < 2
        parts += [case.B * keeps, case.B * ~keeps]
    S = torch.cat(parts, 1)
    outs, ins = S.shape
    values = S[S != 0]
    assert len(values) == S.numel() // 2
    at = (S != 0).view(outs, ins // 4, 4).nonzero()[:, 2].view(outs, ins // 4, 2).tolist()
    places = []
    for top in range(0, outs, 64):
        for tile in range(0, ins // 4, 8):
            for row in (top + first + r for first in (0, 16, 32, 48) for r in range(8)):
                for group in (0, 4, 1, 5, 2, 6, 3, 7):
                    low, high = at[row][tile + group], at[row + 8][tile + group]
                    places.append(low[0] | low[1] << 2 | high[0] << 4 | high[1] << 6)
    places = torch.tensor(places, dtype=torch.uint8, device=DEVICE)
    return torch.cat([values, places.view(values.dtype)])


@needs_triton
@pytest.mark.parametrize(("out", "n", "rank", "joined"), [
    (64, 64, 3, False), (128, 192, 0, False), (64, 1088, 3, False), (64, 128, 32, True), (128, 576, 96, True),
])  # fmt: skip
def test_the_layout_of_the_sparse_tensor_cores(out: int, n: int, rank: int, joined: bool) -> None:
    from hf_sparselr.kernels.cuda.sparse_cores import arrange

    for dtype in (torch.bfloat16, torch.float16):
        case = problem(out, n, "2:4", rank, dtype=dtype)
        actual = arrange(bundle(case, n), joined)
        assert actual.shape == (out, (n + 2 * rank * joined) * 9 // 16)
        assert torch.equal(
            actual.flatten().view(torch.int16), as_cusparselt_has_it(case, joined).view(torch.int16)
        )


# Unpacking, and back


@needs_triton
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
@pytest.mark.parametrize("rank", [0, 3])
def test_densify(out: int, n: int, kind: str | float, rank: int) -> None:
    from hf_sparselr.kernels.triton.unpack import collect, densify

    case = problem(out, n, kind, rank)
    index = index_of(case.mask, n)
    dense = densify(case.mask, index, *case.packed[1:])
    assert_near(dense, case.dense, torch.float32)
    if rank == 0:
        assert torch.equal(dense.double(), case.S)
    assert torch.equal(collect(case.mask, index, dense), dense[case.support])


@needs_triton
@pytest.mark.parametrize(("out", "n", "kind"), [(20, 130, 0.5), (5, 320, "2:4")])
@pytest.mark.parametrize("rank", [0, 80])
def test_densify_in_16_bits(out: int, n: int, kind: str | float, rank: int) -> None:
    from hf_sparselr.kernels.triton.unpack import densify

    case = problem(out, n, kind, rank, dtype=torch.bfloat16)
    dense = densify(case.mask, index_of(case.mask, n), *case.packed[1:])
    assert_near(dense, case.dense, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_is_worth_trying_gives_the_product(rows: int, dtype: torch.dtype) -> None:
    from hf_sparselr.kernels.launch_config import candidates
    from hf_sparselr.kernels.triton.product import _run

    x = draw(rows, 24, seed=6, dtype=dtype)
    for rank, bias in ((1, True), (0, False)):
        case = problem(3, 24, 0.5, rank, bias, dtype)
        plans = candidates(rows, dtype, rank)
        for plan in plans:
            assert_near(_run(x, [bundle(case, 24)], plan)[0], case.expected(x), dtype)
        assert {plan.form for plan in plans} == expected_forms(rows, dtype, rank)


def expected_forms(rows: int, dtype: torch.dtype, rank: int) -> set[str]:
    if rows > 16:
        few = {"blocks"} if dtype == torch.bfloat16 and rows <= 256 else set()
        return few | ({"folded", "beside"} if rank else {"folded"})
    if dtype == torch.float32 or rows == 1:
        return {"vector", "folded"}
    return {"tiles", "folded"}


@needs_triton
@pytest.mark.parametrize(("rows", "kernel", "form"), [
    (1, "packed", None), (9, "packed", None), (3, "auto", "vector"), (20, "auto", "blocks"), (20, "auto", "beside"),
])  # fmt: skip
def test_the_chosen_plan_is_followed(
    rows: int, kernel: str, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_sparselr.kernels.launch_config import Plan
    from hf_sparselr.kernels.triton import product as ways

    taken = []
    for name in ("decode", "multiply_blocks", "multiply_unpacked"):
        real = getattr(ways, name)
        monkeypatch.setattr(
            ways, name, lambda *given, n=name, f=real: taken.append((n, given[2])) or f(*given)
        )
    case = problem(3, 24, 0.5, 1, dtype=torch.bfloat16)
    x, plans = draw(rows, 24, seed=6, dtype=torch.bfloat16), index_of(case.mask, 24).plans
    if form is not None:  # by the next power of two
        plans[1 << rows.bit_length(), 1, torch.bfloat16, False] = Plan(form, 16, 1)
    (out,) = ways.triton_product(x, [bundle(case, 24)], kernel)
    assert_near(out, case.expected(x), torch.bfloat16)
    ((way, plan),) = taken
    assert way == {"blocks": "multiply_blocks", "beside": "multiply_unpacked"}.get(form, "decode")
    assert form is None or plan == Plan(form, 16, 1)
    assert len(plans) == (form is not None)  # nothing was measured


@needs_triton
@pytest.mark.parametrize(("host", "eager"), [(0.4, "sparse"), (0.6, "folded")])
def test_in_a_graph_the_host_does_not_matter(
    host: float, eager: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_sparselr.kernels import autotune as choice
    from hf_sparselr.kernels.launch_config import Plan

    times = {Plan("folded"): 0.5, Plan("sparse"): 0.3}
    monkeypatch.setattr(choice, "milliseconds", lambda run, device: times[run()])
    monkeypatch.setattr(choice, "host_milliseconds", lambda run, device: host)
    monkeypatch.setattr(choice, "_file", lambda device: tmp_path / "table.json")
    choice._table.cache_clear()
    try:
        for rows, few in ((300, False), (20, True)):
            layer = bundle(problem(64, 64, "2:4", dtype=torch.bfloat16), 64)
            best = choice.choose(rows, layer, list(times), lambda plan: plan)
            assert best.form == eager
            choice._table.cache_clear(), layer.index.plans.clear()
            assert choice.known(rows, layer, captured=False) == best
            assert choice.known(rows, layer, captured=True) == (best if few else Plan("sparse"))
    finally:
        choice._table.cache_clear()


@needs_triton
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"name": 1}', '{"name": {"speed": 2}}'])
def test_a_damaged_table_is_as_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparselr.kernels import autotune as choice

    (tmp_path / "table.json").write_text(text)
    monkeypatch.setattr(choice, "_file", lambda device: tmp_path / "table.json")
    choice._table.cache_clear()
    try:
        assert choice.known(1, bundle(problem(3, 24, 0.5), 24), False) is None
    finally:
        choice._table.cache_clear()


# The CPU


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
@pytest.mark.parametrize(("rank", "bias"), [(0, False), (5, True), (16, False)])
def test_one_row_on_the_cpu(
    out: int, n: int, kind: str | float, rank: int, bias: bool, dtype: torch.dtype
) -> None:
    case = problem(out, n, kind, rank, bias, dtype)
    x = draw(n, seed=6, dtype=dtype)
    given = (None if t is None else t.cpu() for t in (x, *case.packed, case.bias, row_starts(case.mask)))
    assert_near(native.multiply(*given), case.expected(x).cpu(), dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_unpacking_on_the_cpu(out: int, n: int, kind: str | float, dtype: torch.dtype) -> None:
    case = problem(out, n, kind, dtype=dtype)
    mask, values = case.mask.cpu(), case.values.cpu()
    assert torch.equal(native.unpack(mask, values, row_starts(mask), n).double(), case.S.cpu())


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    mask, values = pack(torch.ones(200, 1, dtype=dtype), torch.ones(200, 1, dtype=torch.bool))
    bias = torch.cat(
        [draw(196, seed=7, dtype=dtype).cpu(), torch.tensor([0, torch.inf, -torch.inf, torch.nan])]
    )
    x = torch.full((1,), 2.0**-9 + 2.0**-12, dtype=dtype)
    out = native.multiply(x, mask, values, None, None, bias.to(dtype), row_starts(mask))
    expected = (x.float() + bias.to(dtype).float()).to(dtype)
    assert torch.equal(out[:-1], expected[:-1]) and out[-1].isnan()


@needs_native
def test_only_memory_of_the_cpu_is_given_to_c() -> None:
    case = problem(6, 20, 0.5)
    mask, values = case.mask.cpu(), case.values.cpu()
    assert native.takes(mask, values, torch.nn.Parameter(values))
    assert not native.takes(mask, values.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not native.takes(mode.from_tensor(values))
    with pytest.raises(ValueError, match="values hold 1 entries: the mask keeps"):
        native.unpack(mask, values[:1], row_starts(mask), 20)


# The entry


@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
@pytest.mark.parametrize(
    "shape", [(100,), (1, 100), (2, 1, 100), (17, 100), (3, 25, 100), (0, 100), (2, 0, 100)]
)
def test_the_layer(kernel: str, shape: tuple) -> None:
    case = problem(9, 100, 0.5)
    x = draw(*shape, seed=6, dtype=torch.float32)
    layer = layer_of(case, 100, kernel)
    with torch.no_grad():
        assert_near(layer(x), case.expected(x), torch.float32)
        wide = draw(*shape[:-1], 200, seed=7, dtype=torch.float32)[..., ::2]
        assert wide.numel() == 0 or not wide.is_contiguous()
        assert_near(layer(wide), case.expected(wide), torch.float32)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("rank", [0, 3])
def test_compiled_equals_eager(rows: int, rank: int) -> None:
    torch._dynamo.reset()
    layer = layer_of(problem(9, 100, 0.5, rank), 100)
    compiled = torch.compile(layer, backend="eager" if not CUDA else "inductor", fullgraph=True)
    x = draw(rows, 100, seed=6, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_the_operators_are_well_defined() -> None:
    case = problem(5, 12, 0.5)
    x = draw(2, 12, seed=6, dtype=torch.float32)
    arguments = (x, *case.packed, case.bias, 12, "packed")
    torch.library.opcheck(ops.linear, arguments, test_utils=("test_schema", "test_faketensor"))
    layers = [[part] * 2 for part in (*case.packed, case.bias)]
    torch.library.opcheck(
        ops.linears, (x, *layers, 12, "packed"), test_utils=("test_schema", "test_faketensor")
    )


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(4, 8, 0.5)
    x = draw(1, 8, seed=6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"kernel='fast': expected one of 'auto', 'packed', 'dense'"):
        packed_linear(x, *case.packed, case.bias, 8, "fast")
    monkeypatch.setenv("HF_SPARSELR_KERNEL", "slow")
    with pytest.raises(ValueError, match="'slow'"):
        packed_linear(x, *case.packed, case.bias, 8)


def test_other_dtypes_are_refused() -> None:
    case = problem(4, 8, 0.5)
    with pytest.raises(
        TypeError, match=r"inputs of dtype torch\.float16 for a packed layer of dtype torch\.float32"
    ):
        packed_linear(draw(1, 8, seed=6, dtype=torch.float16), *case.packed, case.bias, 8)


def test_dense_keeps_one_copy_and_says_so_once(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    ops._say_dense_once.cache_clear()
    case = problem(6, 20, 0.5)
    layer, x = layer_of(case, 20), draw(3, 20, seed=6, dtype=torch.float32)
    monkeypatch.setenv("HF_SPARSELR_KERNEL", "dense")
    built = []
    monkeypatch.setattr(ops, "_dense", lambda *a, real=ops._dense: built.append(1) or real(*a))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_near(layer(x), case.expected(x), torch.float32)
        assert len(built) == 1
        layer.values.mul_(2)  # noticed
        case.S *= 2
        assert_near(layer(x), case.expected(x), torch.float32)
        assert_near(copy.deepcopy(layer)(x), case.expected(x), torch.float32)
    assert sum("stays in memory" in record.message for record in caplog.records) == 1


def test_the_kernel_is_chosen_on_loading(tmp_path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )  # fmt: skip
    settings = {
        "rank": 2,
        "refine": None,
        "calibration": torch.randint(0, 32, (2, 8)),
        "num_samples": 2,
        "seq_len": 8,
    }
    made = compress(
        LlamaForCausalLM(config).eval(), SparseLRConfig(**settings, kernel="packed", device="cpu")
    )
    made.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    dense = {"quantization_config": SparseLRConfig(kernel="dense")}
    for given, expected in (({}, "auto"), (dense, "dense")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
        assert {m.kernel for m in model.modules() if isinstance(m, SparseLRLinear)} == {expected}
    assert {m.kernel for m in made.modules() if isinstance(m, SparseLRLinear)} == {"packed"}
    with pytest.raises(ValueError, match="kernel='none'"):
        SparseLRConfig(kernel="none")


def test_bench_kernels(tmp_path, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = "--shapes 24x36 --rows 1 3 --patterns 2:4 0.7 --rank 2 --dtype float32 --repeats 2 --device cpu".split()
    bench.run(parser.parse_args([*arguments, "--json", str(tmp_path / "out.json")]))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(r["pattern"], r["rows"]) for r in results] == [("2:4", 1), ("2:4", 3), ("0.7", 1), ("0.7", 3)]
    assert all(r["error"] < 1e-5 and r["speedup"] > 0 for r in results)
    assert "24x36" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--shapes='24'"):
        bench.run(parser.parse_args(["--shapes", "24"]))
