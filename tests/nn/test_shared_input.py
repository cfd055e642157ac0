"""Layers that share their input: found by watching, computed together, given up where the model calls otherwise."""

import copy
import gc
import io
import weakref

import pytest
import torch
from helpers.fast_machine import Machine
from helpers.kernel_cases import CUDA, DEVICE, draw, layer_of, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_sparselr.kernels import PackedWeight, fast_calls
from hf_sparselr.kernels.bindings import binding_of
from hf_sparselr.kernels.fast_calls import FastCall
from hf_sparselr.kernels.program import Memory, Multiply, Part, Program, X, merge, y
from hf_sparselr.nn import linear, shared_input
from hf_sparselr.nn.linear import SparseLRLinear
from hf_sparselr.nn.shared_input import MOST_MISSES, link_shared_inputs

WIDTH = 64


def parent(*outs: int, kernel: str = "auto") -> nn.Module:
    """A module with packed layers of different sizes, patterns and ranks below it."""
    module = nn.Module()
    for number, out in enumerate(outs):
        case = problem(out, WIDTH, "2:4", rank=number + 1, bias=False, dtype=torch.float32)
        module.add_module(f"part{number}", layer_of(case, WIDTH, kernel))
    link_shared_inputs(module)
    return module


def alone(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer.product(x)


def inputs(seed: int = 0) -> torch.Tensor:
    return draw(2, WIDTH, seed=seed, dtype=torch.float32)


def call(module: nn.Module, pairs: list[tuple[int, torch.Tensor]]) -> None:
    layers = list(module.children())
    with torch.no_grad():
        for number, x in pairs:
            torch.testing.assert_close(layers[number](x), alone(layers[number], x))


def test_groups_are_those_called_with_one_tensor() -> None:
    module, x, y = parent(8, 4, 4, 8), inputs(0), inputs(1)
    call(module, [(0, x), (1, y), (2, y), (3, x)])
    group = module.part0.shared_input
    assert group.groups == [None, [1, 2], None, None]
    call(module, [(1, x), (2, x)])
    assert group._ready is None  # nothing is held for longer than a group takes


def test_the_first_computes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = parent(8, 4, 6), inputs()
    call(module, [(0, x), (1, x), (2, x)])
    counts = []
    real = type(module.part0).product
    monkeypatch.setattr(type(module.part0), "product", lambda *a: counts.append(1) or real(*a))
    with torch.no_grad():
        expected = [real(layer, x) for layer in module.children()]
        outputs = [layer(x) for layer in module.children()]
    assert not counts
    for output, target in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, target)


@pytest.mark.parametrize(
    "second", [[(0, 0), (1, 1)], [(0, 0), (0, 0)], [(0, 0), (2, 0)]], ids=["other input", "again", "left out"]
)
def test_a_group_called_otherwise_is_given_up(second: list) -> None:
    module = parent(8, 4, 4)
    group = module.part0.shared_input
    for _ in range(MOST_MISSES):
        x, y, z = inputs(0), inputs(1), inputs(2)
        call(module, [(0, x), (1, x), (0, y), (1, y), (2, z)])
        assert group._ready is None
        x, y, z = inputs(0), inputs(1), inputs(2)
        call(module, [*((number, (x, y)[which]) for number, which in second), (2, z)])
    x, y = inputs(0), inputs(1)
    call(module, [(0, x), (1, x), (0, y), (1, y)])
    assert group.groups[0] is None and group._ready is None


def test_one_interrupted_run_gives_nothing_up() -> None:
    module, x = parent(8, 4), inputs()
    call(module, [(0, x), (1, x), (0, x), (0, x), (1, x)])
    assert module.part0.shared_input.groups[0] == [0, 1]


def test_a_shallow_copy_computes_with_its_own_values() -> None:
    module, x = parent(8, 4), inputs()
    call(module, [(0, x), (1, x)])
    other = copy.copy(module.part0)
    other._parameters = {**other._parameters, "values": nn.Parameter(other.values * 2, requires_grad=False)}
    with torch.no_grad():
        assert not torch.equal(other(x), module.part0(x))


def test_an_input_edited_between_calls_is_not_shared() -> None:
    module, x = parent(8, 4), inputs()
    call(module, [(0, x), (1, x), (0, x)])
    x.mul_(2)
    call(module, [(1, x)])


@settings(deadline=None)  # kernels may be compiled
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.booleans()), max_size=16),
    st.booleans(),
)
def test_any_order_of_calls_gives_the_products(calls: list, inference: bool) -> None:
    module, xs = parent(8, 4, 4), [inputs(0), inputs(1)]
    layers = list(module.children())
    with torch.inference_mode() if inference else torch.no_grad():
        for number, which, fresh in calls:
            if fresh:
                xs[which] = xs[which] + 1
            else:
                xs[which].add_(1)
            torch.testing.assert_close(layers[number](xs[which]), alone(layers[number], xs[which]))


def test_gradients_pass_each_layer_by_itself() -> None:
    module, x = parent(8, 4), inputs()
    call(module, [(0, x), (1, x)])
    x.requires_grad_()
    for layer in module.children():
        layer(x).sum().backward()
    expected = sum(layer.to_dense().weight.sum(0) for layer in module.children())
    torch.testing.assert_close(x.grad, expected.expand_as(x))


def test_layers_that_are_elsewhere_are_left_alone() -> None:
    module, x = parent(8, 4), inputs()
    call(module, [(0, x), (1, x)])
    kept = module.part1
    module.part1 = copy.deepcopy(kept)
    kept.to("meta")  # as an offloaded layer is, until it is called
    with torch.no_grad():
        torch.testing.assert_close(module.part0(x), alone(module.part0, x))


def test_copies_and_files_keep_what_was_seen() -> None:
    module, x = parent(8, 4), inputs()
    call(module, [(0, x), (1, x), (0, x)])
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert other.part0.shared_input.groups[0] == [0, 1] and other.part0.shared_input.layers[1]() is other.part1
        call(other, [(0, x), (1, x)])


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    module, x = parent(8, 4, 6), inputs()

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in module.children()], -1)

    operators = []

    def backend(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        expected = run(x)
        torch.testing.assert_close(torch.compile(run, backend=backend, fullgraph=True)(x), expected)
        assert sum("linears" in name for name in operators) == CUDA
        assert module.part0.shared_input._ready is None
        torch._dynamo.reset()
        if CUDA:
            torch.testing.assert_close(torch.compile(run, mode="reduce-overhead")(x), expected)


def test_one_layer_of_its_width_has_no_siblings() -> None:
    module = parent(8)
    assert module.part0.shared_input is None and module.part0.values.device.type == DEVICE


def test_a_model_dies_at_once() -> None:
    module = parent(8, 4)
    layer = weakref.ref(module.part0)
    gc.disable()
    try:
        del module
        assert layer() is None
    finally:
        gc.enable()


def test_a_member_of_another_dtype_is_left_alone() -> None:
    module, x = parent(8, 4), inputs()
    call(module, [(0, x), (1, x)])
    module.part0.double()
    call(module, [(0, x.double()), (1, x)])


class Slow(list):
    """The numbers of the layers that Python computed."""


@pytest.fixture
def through_c(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """Lets C compute layers on the CPU, as their factors alone, by programs that a GPU would have made ready."""
    if CUDA or fast_calls.compiled() is None:
        pytest.skip("no C compiler, or a GPU, whose driver this would stand in for")
    machine, slow, real = Machine(), Slow(), SparseLRLinear.product
    monkeypatch.setattr(fast_calls, "_library", lambda: machine.library)

    def updated(fast, weights, parameters, kernel, x):
        binding, rows = binding_of(weights), x.numel() // x.shape[-1]
        if fast is None or fast.binding is not binding:
            fast = FastCall(binding, weights, parameters, kernel)
        fast.learn(rows, merge([([number], program_of(weight)) for number, weight in enumerate(weights)]), weights)
        return fast

    def program_of(weight: PackedWeight) -> Program:
        u = Multiply(3, X, Part(0, "A"), weight.rank, WIDTH)
        last = Multiply(y(0), 3, Part(0, "B"), weight.out_features, weight.rank)
        return Program((weight.out_features,), (Memory(torch.float32, per_row=weight.rank),), (u, last))

    for module in (linear, shared_input):
        monkeypatch.setattr(module, "updated", updated)
    monkeypatch.setattr(SparseLRLinear, "product", lambda layer, x: slow.append(layer.number) or real(layer, x))
    return slow


def factors_alone(*outs: int) -> nn.Module:
    module = parent(*outs)
    for layer in module.children():
        layer.values.data.zero_()
    return module


def run(module: nn.Module, order: list[int], seed: int, inference: bool = False) -> None:
    layers = list(module.children())
    with torch.inference_mode() if inference else torch.no_grad():
        x = inputs(seed)
        for number in order:
            layer = layers[number]
            torch.testing.assert_close(layer(x), x @ layer.A.T @ layer.B.T)


def test_c_takes_over_a_group_and_lone_layers(through_c: Slow) -> None:
    module, lone = factors_alone(8, 4, 6), factors_alone(5)
    for seed in range(4):
        through_c.clear()
        run(module, [0, 1, 2], seed), run(lone, [0], seed)
    assert not through_c and module.part0.shared_input._ready is None
    for name in ("values", "A"):
        setattr(module.part1, name, nn.Parameter(getattr(module.part1, name).clone(), requires_grad=False))
        run(module, [0, 1, 2], 7)  # in Python, which sees the new parameter
        through_c.clear()
        run(module, [0, 1, 2], 8)
        assert not through_c


def test_c_gives_a_group_up_that_is_called_otherwise(through_c: Slow) -> None:
    module = factors_alone(8, 4)
    for seed in range(3):
        run(module, [0, 1], seed)
    for seed in range(2 * MOST_MISSES):
        run(module, [0], seed)
    assert module.part0.shared_input.groups == [None, None]
    for seed in range(4):
        through_c.clear()
        run(module, [1, 0], seed)
    assert not through_c


def test_c_serves_inference_mode_layer_by_layer(through_c: Slow) -> None:
    module = factors_alone(8, 4)
    run(module, [0, 1], 0), run(module, [0, 1], 1)
    for seed in range(3):
        through_c.clear()
        run(module, [0, 1], seed, inference=True)
    assert not through_c
    run(module, [0, 1], 5)
    assert not through_c  # together again


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda module: reloaded(module)])
def test_copies_of_a_model_do_not_use_its_weights(through_c: Slow, copied) -> None:
    module = factors_alone(8, 4)
    for seed in range(3):
        run(module, [0, 1], seed)
    other = copied(module)
    if copied is copy.copy:
        other._modules = {name: copy.copy(layer) for name, layer in module._modules.items()}
    for layer in other.children():
        assert "fast_call" not in vars(layer)
        layer.B = nn.Parameter(layer.B.detach() * 2, requires_grad=False)
    run(other, [0, 1], 5), run(module, [0, 1], 5)


def reloaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_c_does_not_keep_a_model(through_c: Slow) -> None:
    module = factors_alone(8, 4)
    for seed in range(3):
        run(module, [0, 1], seed)
    storage = weakref.ref(module.part1.values.untyped_storage())
    gc.disable()
    try:
        del module
        assert storage() is None
    finally:
        gc.enable()
