"""The entry to the packed product: what it accepts, refuses and follows, whichever kernel computes it."""

import copy
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers.kernel_cases import CUDA, DEVICE, assert_near, draw, layer_of, problem
from helpers.paths import ROOT
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.kernels import ops, override, packed_linear, resident
from hf_sparselr.kernels.fast_calls.layer_calls import LayerCalls
from hf_sparselr.nn.linear import SparseLRLinear


@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
@pytest.mark.parametrize("shape", [(100,), (1, 100), (2, 1, 100), (17, 100), (3, 25, 100), (0, 100), (2, 0, 100)])
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
    weight = problem(5, 12, 0.5).weight
    x = draw(2, 12, seed=6, dtype=torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.linear, (x, *weight, "packed"), test_utils=tests)
    torch.library.opcheck(ops.linears, (x, *([part] * 2 for part in weight[:5]), 12, "packed"), test_utils=tests)


@pytest.mark.parametrize("train", [False, True])
def test_an_unknown_kernel_is_refused(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = problem(4, 8, 0.5).weight
    weight.values.requires_grad_(train)
    x = draw(1, 8, seed=6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"kernel='fast': expected one of 'auto', 'packed', 'dense'"):
        packed_linear(x, weight, "fast")
    monkeypatch.setattr(override, "OVERRIDE", "slow")
    with pytest.raises(ValueError, match=r"HF_SPARSELR_KERNEL='slow': expected one of 'auto', 'packed', 'dense'"):
        packed_linear(x, weight)


# What does not fit together


def _moved(name: str):
    return lambda w: w._replace(**{name: getattr(w, name).to("meta")})


HOSTILE = {
    "mask too few rows": lambda w: w._replace(mask=w.mask[:4]),
    "mask too narrow": lambda w: w._replace(mask=w.mask[:, :1]),
    "mask of another dtype": lambda w: w._replace(mask=w.mask.to(torch.int8)),
    "values of two dimensions": lambda w: w._replace(values=w.values[None]),
    "values too few": lambda w: w._replace(values=w.values[:-1]),
    "values too many": lambda w: w._replace(values=torch.cat([w.values, w.values])),
    "values none": lambda w: w._replace(values=w.values[:0]),
    "values of another dtype": lambda w: w._replace(values=w.values.double()),
    "A too narrow": lambda w: w._replace(A=w.A[:, :-1]),
    "A of another rank": lambda w: w._replace(A=w.A[:-1]),
    "A of one dimension": lambda w: w._replace(A=w.A[0]),
    "A alone": lambda w: w._replace(B=None),
    "A of another dtype": lambda w: w._replace(A=w.A.half()),
    "B too short": lambda w: w._replace(B=w.B[:4]),
    "B of another rank": lambda w: w._replace(B=w.B[:, :-1]),
    "B alone": lambda w: w._replace(A=None),
    "bias too short": lambda w: w._replace(bias=w.bias[:4]),
    "bias of two dimensions": lambda w: w._replace(bias=w.bias[None]),
    "bias of another dtype": lambda w: w._replace(bias=w.bias.bfloat16()),
    "another width": lambda w: w._replace(in_features=w.in_features + 8),
    "bits added": lambda w: w._replace(mask=w.mask | 1),
    "bits cleared": lambda w: w._replace(mask=w.mask & 0x7F),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE)
def test_what_does_not_fit_is_refused(edit, kernel: str, train: bool) -> None:
    weight = edit(problem(9, 100, 0.5).weight)
    for rows in (1, 5, 20, 300):
        x = draw(rows, 100, seed=6, dtype=torch.float32).requires_grad_(train)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            packed_linear(x, weight, kernel).sum().backward()


@pytest.mark.parametrize("name", ["mask", "values", "A", "B", "bias"])
def test_a_tensor_that_is_elsewhere_is_named(name: str) -> None:
    weight = _moved(name)(problem(9, 100, 0.5).weight)
    with pytest.raises(ValueError, match="meta"):
        weight.check()


def test_inputs_that_do_not_fit_are_refused() -> None:
    weight = problem(4, 8, 0.5).weight
    with pytest.raises(TypeError, match=r"inputs of dtype torch\.float16 for a packed layer of dtype torch\.float32"):
        packed_linear(draw(1, 8, seed=6, dtype=torch.float16), weight)
    for shape in ((2, 9), (1, 4), (16,)):  # as many entries as two rows, or half a row
        with pytest.raises(ValueError, match=r"inputs have shape .*, expected \(\.\.\., 8\)"):
            packed_linear(draw(*shape, seed=6, dtype=torch.float32), weight)


def test_an_assigned_factor_is_checked_though_the_layer_ran() -> None:
    layer, x = layer_of(problem(9, 100, 0.5), 100), draw(1, 100, seed=6, dtype=torch.float32)
    with torch.no_grad():
        layer(x)
        layer.B = nn.Parameter(layer.B[:4].clone(), requires_grad=False)
        with pytest.raises(ValueError, match=r"B has shape \(4, 3\), expected \(9, 3\)"):
            layer(x)
        layer.B = None
        with pytest.raises(ValueError, match=r"A is given alone"):
            layer(x)
        with pytest.raises(ValueError, match=r"A has shape \(2, 100\), expected|B has shape"):
            layer(x, factors=(torch.zeros(2, 100, device=DEVICE), torch.zeros(9, 3, device=DEVICE)))


# Edits


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "dense"])
@pytest.mark.parametrize("name", ["values", "A", "B", "bias"])
@pytest.mark.parametrize("through", ["in place", "data", "new data", "new parameter"])
def test_edits_are_seen(name: str, through: str, kernel: str, inference: bool) -> None:
    case = problem(9, 100, 0.5)
    layer = copy.deepcopy(layer_of(case, 100, kernel))  # whose memory is not the case's
    x = draw(2, 100, seed=6, dtype=torch.float32)
    with torch.inference_mode(inference), torch.no_grad():
        assert_near(layer(x), case.expected(x), torch.float32)
        parameter = getattr(layer, name)
        if through == "in place":
            parameter.mul_(2)
        elif through == "data":
            parameter.data.mul_(2)
        elif through == "new data":
            parameter.data = parameter.data * 2
        else:
            setattr(layer, name, nn.Parameter(parameter * 2, requires_grad=False))
        if name == "values":
            case.S *= 2
        else:
            setattr(case, name, getattr(case, name) * 2)
        assert_near(layer(x), case.expected(x), torch.float32)


def test_dense_keeps_one_copy_and_says_so_once(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    resident._say_once.cache_clear()
    case = problem(6, 20, 0.5)
    layer, x = layer_of(case, 20), draw(3, 20, seed=6, dtype=torch.float32)
    monkeypatch.setattr(override, "OVERRIDE", "dense")
    built = []
    monkeypatch.setattr(ops, "unpacked", lambda w, real=ops.unpacked: built.append(1) or real(w))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_near(layer(x), case.expected(x), torch.float32)
        assert len(built) == 1
        assert_near(copy.deepcopy(layer)(x), case.expected(x), torch.float32)
    assert sum("stays in memory" in record.message for record in caplog.records) == 1


def test_what_was_derived_is_freed_with_the_layer() -> None:
    kept = len(resident._RESIDENT)
    layers = [layer_of(problem(6, 20, 0.5), 20, "dense") for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            layer(draw(3, 20, seed=6, dtype=torch.float32))
    assert len(resident._RESIDENT) == kept + 3
    del layers, layer
    assert len(resident._RESIDENT) == kept


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_threads_may_share_a_layer_and_copy_it(kernel: str) -> None:
    case = problem(9, 100, 0.5)
    layer, x, failures = layer_of(case, 100, kernel), draw(1, 100, seed=6, dtype=torch.float32), []
    expected, interval = case.expected(x), sys.getswitchinterval()

    def run() -> None:
        try:
            for number in range(20):
                with torch.no_grad():
                    assert_near((layer if number % 2 else copy.deepcopy(layer))(x), expected, torch.float32)
        except Exception as error:
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not failures


# Other ways to run a layer


def test_vmap_grad_and_jvp_are_as_through_a_linear() -> None:
    case = problem(9, 100, 0.5)
    layer = layer_of(case, 100)
    dense = layer.to_dense()
    x, tangent = (draw(4, 3, 100, seed=seed, dtype=torch.float32) for seed in (6, 7))
    for transform in (
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.vmap(f, in_dims=1)(x),
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.jacrev(f)(x[0, 0]),
    ):
        torch.testing.assert_close(transform(layer), transform(dense), rtol=1e-4, atol=1e-4)

    def loss(A: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"A": A}, (x[0],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(torch.stack([layer.A.detach(), 2 * layer.A.detach()]))
    A = (2 * layer.A.detach()).requires_grad_()
    F.linear(x[0], layer_S(layer) + layer.B @ A, layer.bias).square().sum().backward()
    torch.testing.assert_close(gradients[1], A.grad, rtol=1e-4, atol=1e-3)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(out, F.linear(tangent, dense.weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", [-1, 1])
def test_values_are_counted_whatever_computes(change, dtype, kernel, train) -> None:
    layer = layer_of(problem(9, 100, 0.5, dtype=dtype), 100).cpu()
    layer.kernel = kernel
    count, x = layer.values.numel(), torch.zeros(3, 100, dtype=dtype)
    layer.values = nn.Parameter(torch.zeros(count + change, dtype=dtype), requires_grad=train)
    with pytest.raises(ValueError, match=f"values hold {count + change} entries, but the mask keeps {count}"):
        layer(x)
    for name in ("values", "mask"):
        setattr(layer, name, None)
        with pytest.raises(TypeError, match=f"{name} is None"):
            layer(x)


def test_vmap_over_stacked_layers() -> None:
    layers = [layer_of(problem(9, 100, 0.5), 100), layer_of(problem(9, 100, 0.5), 100)]
    layers[1].values.data.mul_(2)
    layers[1].A.data.mul_(3)
    state, _ = torch.func.stack_module_state(layers)
    x = draw(3, 100, seed=6, dtype=torch.float32)
    out = torch.func.vmap(lambda tensors: torch.func.functional_call(layers[0], tensors, (x,)))(state)
    torch.testing.assert_close(out, torch.stack([layer(x) for layer in layers]), rtol=1e-4, atol=1e-4)


def layer_S(layer: SparseLRLinear) -> torch.Tensor:  # noqa: N802
    return layer.to_dense().weight.detach() - layer.B @ layer.A


@pytest.mark.parametrize("grad", [False, True])
def test_meta_and_fake_tensors_pass(grad: bool) -> None:
    layer = layer_of(problem(9, 100, 0.5), 100)
    with torch.set_grad_enabled(grad):
        meta = copy.deepcopy(layer).to("meta")(torch.empty(2, 3, 100, device="meta"))
        assert meta.is_meta and meta.shape == (2, 3, 9)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = layer(mode.from_tensor(draw(5, 100, seed=6, dtype=torch.float32)))
        assert fake.shape == (5, 9) and fake.device.type == DEVICE


def test_modes_see_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    case, x = problem(9, 100, 0.5), draw(2, 100, seed=6, dtype=torch.float32)
    with torch.no_grad(), Watch():
        out = layer_of(case, 100)(x)
    assert_near(out, case.expected(x), torch.float32)
    assert any("hf_sparselr" in name for name in seen)


def test_an_exported_layer_loads_and_runs(tmp_path) -> None:
    case, x = problem(9, 100, 0.5), draw(2, 100, seed=6, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(layer_of(case, 100), (x,))
        torch.export.save(program, tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2")
        assert_near(loaded.module()(x), case.expected(x), torch.float32)


def test_an_exported_layer_loads_where_only_the_package_was_imported(tmp_path) -> None:
    case, x = problem(9, 100, 0.5), draw(2, 100, seed=6, dtype=torch.float32)
    with torch.no_grad():
        torch.export.save(torch.export.export(layer_of(case, 100), (x,)), tmp_path / "layer.pt2")
        torch.save((x, case.expected(x)), tmp_path / "expected.pt")
    code = """
import hf_sparselr, torch
program = torch.export.load("layer.pt2")
x, expected = torch.load("expected.pt")
torch.testing.assert_close(program.module()(x).double(), expected, rtol=1e-4, atol=1e-4)
"""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        timeout=300,
    )


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
    made = compress(LlamaForCausalLM(config).eval(), SparseLRConfig(**settings, kernel="packed", device="cpu"))
    made.save_pretrained(tmp_path)
    assert '"kernel"' not in (tmp_path / "config.json").read_text()
    dense = {"quantization_config": SparseLRConfig(kernel="dense")}
    for given, expected in (({}, "auto"), (dense, "dense")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
        assert {m.kernel for m in model.modules() if isinstance(m, SparseLRLinear)} == {expected}
    assert {m.kernel for m in made.modules() if isinstance(m, SparseLRLinear)} == {"packed"}
    with pytest.raises(ValueError, match="kernel='none'"):
        SparseLRConfig(kernel="none")


@pytest.mark.parametrize("calls", [None, LayerCalls()])
@pytest.mark.parametrize("trained", ["x", "A B bias"])
def test_the_gradients_that_a_gpu_takes(trained: str, calls: LayerCalls | None) -> None:
    """Everywhere but for the values, which a kernel collects."""
    case = problem(5, 24, 0.5, dtype=torch.float64)
    x, weight = draw(2, 3, 24, seed=6), case.weight
    given = {"x": x, "A": weight.A, "B": weight.B, "bias": weight.bias}
    for name in trained.split():
        given[name] = given[name].clone().requires_grad_()

    def product(*parts: torch.Tensor) -> torch.Tensor:
        x, A, B, bias = parts
        return ops.Differentiable.apply(x, weight.mask, weight.values, A, B, bias, 24, "auto", calls)

    assert torch.autograd.gradcheck(product, tuple(given.values()))
