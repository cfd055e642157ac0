"""Whatever is asked of a layer in the order of tiles comes out as if it were in that of rows."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from hf_sparselr.kernels import KERNELS
from hf_sparselr.nn.linear import SparseLRLinear
from tests.helpers.kernel_cases import layer_of, problem

OUT, IN, RANK = 32, 128, 4


def rows(kind: str | float = 0.5, seed: int = 0) -> SparseLRLinear:
    return layer_of(problem(OUT, IN, kind, RANK, True), IN).cpu()


def tiles(kind: str | float = 0.5) -> SparseLRLinear:
    layer = rows(kind)
    layer.to_tiles()
    assert layer.is_tiled
    return layer


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5,)), IN, generator=torch.Generator().manual_seed(7))


def raw(layer: SparseLRLinear) -> list[torch.Tensor]:
    """Mask and values as they lie in memory."""
    own, _ = layer.own_parameters()
    return [own["mask"].detach().clone(), own["values"].detach().clone()]


def assert_rows(layer: nn.Module, expected: SparseLRLinear | None = None) -> None:
    expected = expected or rows()
    assert not layer.is_tiled
    for mine, theirs in zip(raw(layer), raw(expected), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", [0.5, 0.7, "2:4", "empty", "full", "empty rows"])
def test_there_and_back(kind: str | float) -> None:
    layer = tiles(kind)
    assert kind in ("empty", "full") or not torch.equal(raw(layer)[0], raw(rows(kind))[0])
    layer.to_rows()
    assert_rows(layer, rows(kind))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_product(kernel: str, count: int) -> None:
    layer, expected = tiles(), rows()
    layer.kernel = expected.kernel = kernel
    with torch.no_grad():
        for _ in range(3):  # by Python, then by C where it can
            torch.testing.assert_close(layer(x(count)), expected(x(count)))
        torch.testing.assert_close(layer(x(count), (None, None)), expected(x(count), (None, None)))
    assert layer.is_tiled


@pytest.mark.parametrize("grad", [True, False])
def test_compiled(grad: bool) -> None:
    layer, expected = tiles(), rows()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = x().requires_grad_(grad)
    torch.testing.assert_close(compiled(inputs), expected(inputs))
    assert layer.is_tiled
    layer.to_rows()
    torch.testing.assert_close(compiled(inputs), expected(inputs))
    layer.to_tiles()
    torch.testing.assert_close(compiled(inputs), expected(inputs))


def test_tracing_in_rows_does_not_serve_tiles() -> None:
    layer, expected = rows(), rows()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x())
        layer.to_tiles()
        torch.testing.assert_close(compiled(x()), expected(x()))


def test_gradients() -> None:
    layer, expected = tiles(), rows()
    for one in (layer, expected):
        one.A.requires_grad_(True), one.B.requires_grad_(True)
    if not layer.is_tiled:  # A was asked for
        layer.to_tiles()
    found = []
    for one in (layer, expected):
        inputs = x().requires_grad_(True)
        one(inputs).square().sum().backward()
        A, B = one.factors
        found.append((inputs.grad, A.grad, B.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_change_of_order_between_forward_and_backward() -> None:
    for first in (rows, tiles):
        layer, inputs = first(), x().requires_grad_(True)
        out = layer(inputs)
        layer.to_rows() if layer.is_tiled else layer.to_tiles()
        out.square().sum().backward()
        again = x().requires_grad_(True)
        rows()(again).square().sum().backward()
        torch.testing.assert_close(inputs.grad, again.grad)


def test_values_that_train() -> None:
    layer = tiles()
    layer.values.requires_grad_(True)
    assert_rows(layer)
    layer.to_tiles()
    assert_rows(layer)
    layer(x()).sum().backward()
    assert layer.values.grad.shape == layer.values.shape


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.values,
        lambda m: m.mask,
        lambda m: getattr(m, "values"),  # noqa: B009
        lambda m: list(m.parameters()),
        lambda m: dict(nn.Sequential(m).named_parameters()),
        lambda m: m.get_parameter("values"),
        lambda m: m.state_dict(),
        lambda m: nn.Sequential(m).state_dict(),
        lambda m: m._parameters["values"],
        lambda m: m.double().float(),
        lambda m: m.to("cpu", torch.bfloat16).float(),
        lambda m: m.share_memory(),
        lambda m: m.requires_grad_(False),
        lambda m: m.load_state_dict(rows().state_dict()),
        lambda m: m.load_state_dict({k: v.clone() for k, v in rows().state_dict().items()}, assign=True),
        lambda m: copy.copy(m),
        lambda m: pickle.dumps(m),
        lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (x(),)),
        lambda m: m._replicate_for_data_parallel(),
    ],
)
def test_others_find_rows(ask) -> None:
    layer, expected = tiles(), rows()
    ask(layer), ask(expected)
    if layer.is_tiled:  # the replicas of DataParallel, whose parameters were asked for before
        layer.to_rows()
    assert_rows(layer, expected)
    torch.testing.assert_close(layer(x()), expected(x()))


@pytest.mark.parametrize("ask", ["weight", "dtype", "device", "repr", "dense", "packed_weight", "rank", "eval"])
def test_what_others_find_without_a_change(ask: str) -> None:
    layer, expected = tiles(), rows()
    if ask == "weight":
        assert layer.weight.shape == (OUT, IN) and layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight + 0, expected.weight + 0)
    elif ask == "dense":
        assert torch.equal(layer.to_dense().weight, expected.to_dense().weight)
    elif ask == "repr":
        assert repr(layer) == repr(expected)
    elif ask == "packed_weight":
        again = layer.packed_weight.in_rows()
        assert torch.equal(again.mask, expected.mask) and torch.equal(again.values, expected.values)
    elif ask == "eval":
        assert not layer.eval().training
    else:
        assert getattr(layer, ask) == getattr(expected, ask)
    assert layer.is_tiled


@pytest.mark.parametrize("way", [copy.deepcopy, "pickle", "save"])
def test_copies_and_files(way) -> None:
    layer = nn.Sequential(tiles())
    if way == "save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = pickle.loads(pickle.dumps(layer)) if way == "pickle" else way(layer)
    assert_rows(again[0])
    again[0].values.zero_()
    assert layer[0].values.any()


def test_factors_are_replaced_without_a_change() -> None:
    layer, expected = tiles(), rows()
    for one in (layer, expected):
        one.A = nn.Parameter(torch.ones(RANK, IN), requires_grad=False)
        one.bias = None
    assert layer.is_tiled
    with torch.no_grad():
        torch.testing.assert_close(layer(x()), expected(x()))
    with pytest.raises(AttributeError, match="computed and cannot be assigned"):
        layer.weight = nn.Parameter(torch.ones(OUT, IN))


@pytest.mark.parametrize("name", ["values", "mask"])
def test_replaced_parameters_are_rows(name: str) -> None:
    layer, expected = tiles(), rows()
    new = nn.Parameter(getattr(expected, name).detach().clone(), requires_grad=False)
    setattr(layer, name, new)
    assert_rows(layer)
    layer = tiles()
    layer._parameters[name] = new  # as accelerate does
    assert_rows(layer)
    layer = tiles()
    delattr(layer, name)
    layer.register_parameter(name, new)
    assert_rows(layer)


def test_edits_reach_the_layer() -> None:
    layer, expected = tiles(), rows()
    with torch.no_grad():
        layer.values.mul_(2)
        expected.values.mul_(2)
        layer.to_tiles()
        torch.testing.assert_close(layer(x()), expected(x()))
        layer.values.data = torch.ones_like(expected.values)
        expected.values.data = torch.ones_like(expected.values)
        torch.testing.assert_close(layer(x()), expected(x()))


def test_what_others_hold_stays_in_rows() -> None:
    layer = rows()
    held = layer.values
    layer.to_tiles()
    assert_rows(layer)
    del held
    state = layer.state_dict()
    layer.to_tiles()
    assert_rows(layer)
    del state
    optimizer = torch.optim.SGD(layer.parameters())
    layer.to_tiles()
    assert_rows(layer)
    del optimizer
    layer.to_tiles()
    assert layer.is_tiled


def test_tied_layers_stay_in_rows() -> None:
    layer, other = rows(), rows()
    other.values = layer.values
    for one in (layer, other):
        one.to_tiles()
        assert_rows(one)
    twin = copy.copy(layer)
    twin.to_tiles()
    assert_rows(twin)


def test_a_layer_that_is_asked_often_stays_in_rows() -> None:
    layer = rows()
    for _ in range(20):
        layer.to_tiles()
        _ = layer.values.sum()
    assert_rows(layer)
    assert_rows(copy.deepcopy(layer))


def test_attributes_of_parameters_are_kept() -> None:
    layer = rows()
    layer.values.mark = "kept"
    layer.to_tiles()
    assert layer.values.mark == "kept"


def test_threads() -> None:
    layer, expected, failures = rows(), rows(), []
    right = expected(x()).detach()
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.allclose(layer(x()), right, atol=1e-4):
                    failures.append("wrong")

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        layer._returns = 0
        layer.to_tiles()
        layer.to_rows()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_in_inference_mode() -> None:
    layer = rows()
    with torch.inference_mode():
        layer.to_tiles()
        torch.testing.assert_close(layer(x()), rows()(x()))
    assert layer.is_tiled and not layer.values.is_inference()
    layer.A.requires_grad_(True)
    layer(x()).sum().backward()


def test_transforms_and_derivatives() -> None:
    layer, expected = tiles(), rows()
    for one in (layer, expected):
        one.to_tiles() if one is layer else None
    mine, theirs = (torch.func.jvp(one, (x(),), (torch.ones(5, IN),)) for one in (layer, expected))
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.func.vmap(layer)(x(3, 2)), expected(x(3, 2)))
    assert layer.is_tiled


def test_exported() -> None:
    layer = tiles()
    program = torch.export.export(layer, (x(),))
    torch.testing.assert_close(program.module()(x()), rows()(x()))
    assert torch.equal(program.state_dict["values"], rows().values)
