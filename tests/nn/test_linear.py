"""SparseLRLinear and its kernel against the dense layer, in value, gradient and memory."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_sparselr.format.bitmask import pack
from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.kernels import sparse_linear
from hf_sparselr.nn.linear import SparseLRLinear

OUT, IN, RANK = 6, 11, 3
CASES = pytest.mark.parametrize(
    ("rank", "bias"), [(0, False), (0, True), (RANK, False), (RANK, True)], ids="S S+b SBA SBA+b".split()
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(
    rank: int = RANK,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    out: int = OUT,
    n: int = IN,
    transposed: bool = False,
) -> tuple[SparseLRLinear, torch.Tensor]:
    """A layer, and the dense weight S + B A it stands for, in float64."""
    mask = randn(out, n, seed=1) > 0
    S = randn(out, n, seed=2, dtype=dtype) * mask
    A = randn(rank, n, seed=3, dtype=dtype) if rank else None
    B = randn(out, rank, seed=4, dtype=dtype) if rank else None
    layer = SparseLRLinear.from_decomposition(
        Decomposition(S, mask, A, B), randn(out, seed=5, dtype=dtype) if bias else None, transposed
    )
    return layer, S.double() + (B.double() @ A.double() if rank else 0)


def train_everything(layer: SparseLRLinear) -> SparseLRLinear:
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return layer


# Values


@CASES
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN), (2, 0, IN)])
def test_forward_equals_the_dense_layer(rank: int, bias: bool, shape: tuple) -> None:
    layer, dense = make(rank, bias)
    inputs = randn(*shape, seed=6)
    expected = F.linear(inputs, dense, layer.bias)
    torch.testing.assert_close(layer(inputs), expected)
    S = dense - layer.B @ layer.A if rank else dense
    torch.testing.assert_close(layer(inputs, factors=(None, None)), F.linear(inputs, S, layer.bias))


def test_forward_takes_non_contiguous_inputs() -> None:
    layer, dense = make()
    for inputs in (randn(IN, 4).T, randn(2, IN, 5).transpose(1, 2), randn(4, 2 * IN)[:, ::2]):
        assert not inputs.is_contiguous()
        torch.testing.assert_close(layer(inputs), F.linear(inputs, dense, layer.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_in_lower_precision(dtype: torch.dtype) -> None:
    layer, dense = make(dtype=dtype, out=32, n=64)
    inputs = randn(10, 64, dtype=dtype)
    out = layer(inputs)
    assert out.dtype == dtype
    expected = F.linear(inputs.double(), dense, layer.bias.double())
    scale = expected.abs().max()
    assert (out.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("support", ["empty", "full", "empty row"])
def test_extreme_supports(support: str) -> None:
    mask = torch.full((OUT, IN), support != "empty")
    if support == "empty row":
        mask[2] = False
    S = randn(OUT, IN) * mask
    layer = SparseLRLinear.from_decomposition(Decomposition(S, mask))
    assert layer.values.numel() == int(mask.sum())
    assert torch.equal(layer.weight, S)
    torch.testing.assert_close(layer(randn(3, IN)), randn(3, IN) @ S.T)


# Gradients


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 3, IN)])
@pytest.mark.parametrize("rank", [0, RANK])
def test_gradients(shape: tuple, rank: int) -> None:
    layer = train_everything(make(rank)[0])
    names = ["values", "bias", *(["A", "B"] if rank else [])]

    def forward(inputs: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        state = {**dict(layer.named_parameters()), **dict(zip(names, parameters, strict=True))}
        return torch.func.functional_call(layer, state, (inputs,))

    arguments = [randn(*shape, seed=6), *(getattr(layer, name).detach() for name in names)]
    assert torch.autograd.gradcheck(forward, [argument.requires_grad_() for argument in arguments])


def test_second_derivatives() -> None:
    mask = randn(OUT, IN, seed=1) > 0
    packed, values = pack(randn(OUT, IN), mask)
    arguments = (randn(3, IN).requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x, v: sparse_linear(x, packed, v, IN), arguments)


@pytest.mark.parametrize("inputs_train", [False, True])
@pytest.mark.parametrize("values_train", [False, True])
def test_gradients_only_where_asked(inputs_train: bool, values_train: bool) -> None:
    layer, dense = make(rank=0)
    layer.values.requires_grad_(values_train)
    inputs = randn(4, IN).requires_grad_(inputs_train)
    out = layer(inputs)
    assert out.requires_grad == (inputs_train or values_train)
    if out.requires_grad:
        out.sum().backward()
    torch.testing.assert_close(inputs.grad, dense.sum(0).expand(4, -1) if inputs_train else None)
    expected = inputs.detach().sum(0).expand(OUT, -1)[dense != 0] if values_train else None
    torch.testing.assert_close(layer.values.grad, expected)


def test_gradients_of_no_rows() -> None:
    layer = train_everything(make()[0])
    layer(randn(0, IN)).sum().backward()
    assert all(not p.grad.any() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_saves_nothing_dense_for_backward(autocast: bool) -> None:
    layer = train_everything(make(dtype=torch.float32, out=64, n=64, rank=4)[0])
    saved = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    inputs = randn(3, 64, dtype=torch.float32).requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = layer(inputs)
    assert saved and max(saved) < 64 * 64
    out.sum().backward()
    assert inputs.grad is not None


def test_autocast_follows_nn_linear() -> None:
    layer = train_everything(make(dtype=torch.float32, out=32, n=64)[0])
    dense = layer.to_dense().requires_grad_(True)
    grads = []
    for module in (layer, dense):
        inputs = randn(10, 64, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(inputs)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        grads.append((out.detach().float(), inputs.grad, module.bias.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03 * float(theirs.abs().max()))
    for parameter in (layer.values, layer.A, layer.B):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0


def test_autocast_off_by_default_keeps_fp32() -> None:
    layer, _ = make(dtype=torch.float32)
    assert layer(randn(2, IN, dtype=torch.float32)).dtype == torch.float32


# The module


@CASES
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_is_built_on_every_read(rank: int, bias: bool, transposed: bool) -> None:
    layer, dense = make(rank, bias, transposed=transposed)
    dense = dense.T if transposed else dense
    weight = layer.weight
    torch.testing.assert_close(weight.detach(), dense)
    assert weight.is_contiguous()
    layer.values.data.mul_(2)
    assert not torch.equal(weight, dense)


def test_weight_is_read_only() -> None:
    layer, dense = make()
    for value in (torch.zeros(OUT, IN), nn.Parameter(torch.zeros(OUT, IN))):
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = value
    torch.testing.assert_close(layer.weight, dense)
    assert "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())


def test_looks_like_a_frozen_linear_layer() -> None:
    layer, _ = make()
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.rank) == (IN, OUT, RANK)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.compute_dtype == torch.float64
    assert make(rank=0, bias=False)[0].rank == 0
    kept = layer.values.numel() / (OUT * IN)
    assert f"sparsity={1 - kept:.4g}, rank={RANK}, bias=True" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_decomposition_rounds_to_a_dtype(dtype: torch.dtype) -> None:
    mask = randn(OUT, IN, seed=1) > 0
    parts = Decomposition(randn(OUT, IN) * mask, mask, randn(RANK, IN), randn(OUT, RANK))
    layer = SparseLRLinear.from_decomposition(parts, randn(OUT), dtype=dtype)
    assert layer.mask.dtype == torch.uint8
    assert torch.equal(layer.values, parts.S[mask].to(dtype))
    assert torch.equal(layer.A, parts.A.to(dtype)) and torch.equal(layer.B, parts.B.to(dtype))
    assert layer.bias.dtype == layer.weight.dtype == dtype


def test_kept_zeros_stay_in_the_support() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    layer = SparseLRLinear.from_decomposition(Decomposition(torch.zeros(2, 4), mask))
    assert layer.values.shape == (8,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_to_dense_gives_a_linear(dtype: torch.dtype, bias: bool) -> None:
    layer, _ = make(bias=bias, dtype=dtype)
    dense = layer.to_dense()
    assert type(dense) is nn.Linear and dense.weight.dtype == dtype
    assert torch.equal(dense.weight, layer.weight)
    assert dense.bias is None if not bias else torch.equal(dense.bias, layer.bias)
    if dtype == torch.float64:
        torch.testing.assert_close(dense(randn(4, IN)), layer(randn(4, IN)))


def test_to_dense_gives_a_conv1d_where_it_replaced_one() -> None:
    layer, expected = make(transposed=True)
    dense = layer.to_dense()
    assert type(dense) is Conv1D and dense.weight.shape == (IN, OUT)
    torch.testing.assert_close(dense.weight.detach(), expected.T)
    torch.testing.assert_close(dense(randn(2, 4, IN)), layer(randn(2, 4, IN)))


@CASES
def test_state_dict_round_trip(rank: int, bias: bool) -> None:
    layer, dense = make(rank, bias)
    state = layer.state_dict()
    assert state.keys() == {"mask", "values", *(["A", "B"] if rank else []), *(["bias"] if bias else [])}
    empty = SparseLRLinear(IN, OUT, len(layer.values), rank, bias, dtype=torch.float64)
    empty.load_state_dict(state)
    torch.testing.assert_close(empty.weight, dense)
    assert torch.equal(empty(randn(4, IN)), layer(randn(4, IN)))


def test_state_dict_of_another_support_is_refused() -> None:
    state = make()[0].state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        SparseLRLinear(IN, OUT, len(state["values"]) + 1, RANK, True).load_state_dict(state)


def test_deepcopy_is_independent() -> None:
    layer, dense = make()
    clone = copy.deepcopy(layer)
    clone.values.data.zero_()
    clone.A.data.zero_()
    torch.testing.assert_close(layer.weight, dense)
    assert not clone.weight.any()


def test_moves_and_casts_like_a_module() -> None:
    layer, dense = make()
    layer.to(torch.bfloat16)
    assert layer.mask.dtype == torch.uint8 and layer.compute_dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.double(), dense, rtol=0.05, atol=0.05)
    with torch.device("meta"):
        empty = SparseLRLinear(IN, OUT, 5, RANK)
    assert all(parameter.is_meta for parameter in empty.parameters())


@CASES
def test_compiles_without_graph_breaks(rank: int, bias: bool) -> None:
    torch._dynamo.reset()
    layer = train_everything(make(rank, bias)[0])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    results = []
    for module in (layer, compiled):
        inputs = randn(4, IN).requires_grad_()
        layer.zero_grad()
        out = module(inputs)
        out.square().sum().backward()
        results.append([out, inputs.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


# The view of the dense weight


def test_shape_and_kind_of_the_weight_are_known_without_building_it(monkeypatch) -> None:
    layer, _ = make(dtype=torch.bfloat16, transposed=True)
    monkeypatch.setattr(SparseLRLinear, "_dense", None)
    weight = layer.weight
    assert (weight.shape, weight.ndim, weight.numel(), len(weight)) == ((IN, OUT), 2, IN * OUT, IN)
    assert (weight.dtype, weight.device, weight.is_floating_point()) == (
        torch.bfloat16,
        layer.values.device,
        True,
    )
    assert weight.data.shape == (IN, OUT) and isinstance(weight, torch.Tensor)
    with pytest.raises(TypeError):
        weight + 1  # builds it


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.zero_(),
        lambda w: w.data.add_(1),
        lambda w: w.data.__isub__(1),
        lambda w: w.__setitem__(0, 1),
        lambda w: setattr(w, "data", torch.ones(OUT, IN)),
        lambda w: setattr(w, "requires_grad", True),
        lambda w: torch.add(torch.ones(OUT, IN), 1, out=w),
        lambda w: nn.init.normal_(w),
    ],
)
def test_edits_of_the_weight_raise(edit) -> None:
    layer, dense = make()
    with pytest.raises(RuntimeError, match="cannot be edited"):
        edit(layer.weight)
    torch.testing.assert_close(layer.weight, dense)


def test_gradients_flow_through_the_weight() -> None:
    layer = train_everything(make(bias=False)[0])
    inputs = randn(4, IN)
    (inputs @ layer.weight.T).square().sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}
    layer.zero_grad()
    layer(inputs).square().sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, layer.get_parameter(name).grad)


def test_the_weight_is_plain_to_the_compiler() -> None:
    layer, dense = make()
    torch._dynamo.reset()
    use = torch.compile(lambda x: x.to(layer.weight.dtype) @ layer.weight.T, backend="eager", fullgraph=True)
    torch.testing.assert_close(use(torch.ones(2, IN)), torch.ones(2, IN, dtype=dense.dtype) @ dense.T)


def test_a_layer_takes_only_its_own_weight_back() -> None:
    layer, dense = make()
    layer.weight = layer.weight  # as PEFT does when it unloads an adapter
    for value in (
        make()[0].weight,
        torch.zeros(layer.weight.shape),
        nn.Parameter(torch.zeros(layer.weight.shape)),
    ):
        with pytest.raises(AttributeError, match="cannot be assigned"):
            layer.weight = value
    torch.testing.assert_close(layer.weight, dense)
