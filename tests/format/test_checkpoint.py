"""The packed form bit for bit, and the checks of packed checkpoints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_sparselr.format.bitmask import count_kept, pack, pack_mask, unpack, unpack_mask
from hf_sparselr.format.checkpoint import (
    FormatError,
    check_layer,
    check_masks,
    group_layers,
    read_headers,
)
from hf_sparselr.format.patterns import NM

DTYPES = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
OUT, IN, RANK = 3, 10, 2


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(DTYPES[tensor.dtype])


def test_bit_order() -> None:
    kept = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]]).bool()
    packed = pack_mask(kept)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0b1000_0101, 0b10], [0, 0b1]]  # the lowest bit is the first input
    assert torch.equal(unpack_mask(packed, 10), kept)


def test_values_come_row_after_row() -> None:
    dense = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    assert pack(dense, dense != 0)[1].tolist() == [1.0, 2.0, 3.0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip_is_exact_for_any_bits(data: st.DataObject) -> None:
    """NaN payloads, infinities, -0.0 and kept zeros included."""
    dtype = data.draw(st.sampled_from(sorted(DTYPES, key=str)))
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 19))
    keep = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    limits = torch.iinfo(DTYPES[dtype])
    raw = st.integers(limits.min, limits.max)
    words = data.draw(st.lists(raw, min_size=rows * columns, max_size=rows * columns))
    mask = torch.tensor(keep).view(rows, columns)
    stored = torch.tensor(words, dtype=DTYPES[dtype]).view(rows, columns) * mask
    packed, values = pack(stored.view(dtype), mask)
    assert packed.shape == (rows, -(-columns // 8)) and values.shape == (sum(keep),)
    assert torch.equal(unpack_mask(packed, columns), mask)
    assert torch.equal(bits(unpack(packed, values, columns)), stored)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("support", ["none", "all", "empty row", "special values"])
def test_round_trip_of_hard_cases(dtype: torch.dtype, columns: int, support: str) -> None:
    dense = torch.randn(4, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.full((4, columns), support != "none")
    if support == "empty row":
        mask[1] = False
    if support == "special values":
        dense[0], dense[1], dense[2] = 0.0, -0.0, float("nan")
        bits(dense)[2] |= 5  # a payload
    dense = torch.where(mask, dense, 0)
    packed, values = pack(dense, mask)
    assert values.dtype == dtype and len(values) == int(mask.sum())
    assert torch.equal(unpack_mask(packed, columns), mask)
    assert torch.equal(bits(unpack(packed, values, columns)), bits(dense))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (1, 8), (3, 5), (2, 6), (8, 16), (3, 32)])
def test_a_packed_mask_is_counted_and_compared_with_its_pattern(n: int, m: int) -> None:
    generator, pattern = torch.Generator().manual_seed(0), NM(n, m)
    obeying = pattern.mask(torch.rand(7, 3 * m, generator=generator))
    breaking = obeying.clone()
    breaking[4, 2 * m : 2 * m + n + 1] = True
    for mask, obeys in ((obeying, True), (breaking, False)):
        packed = pack_mask(mask)
        assert count_kept(packed, 3 * m, pattern) == (int(mask.sum()), obeys)
        assert count_kept(packed, 3 * m) == (int(mask.sum()), True)


def layer_tensors(dtype: torch.dtype = torch.float32, rank: int = RANK, bias: bool = True) -> dict:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(OUT, IN, generator=generator) < 0.5
    packed, values = pack(torch.randn(OUT, IN, generator=generator).to(dtype), mask)
    tensors = {"mask": packed, "values": values, "weight": torch.empty(0, dtype=dtype)}
    if rank:
        tensors |= {"A": torch.ones(rank, IN, dtype=dtype), "B": torch.ones(OUT, rank, dtype=dtype)}
    if bias:
        tensors["bias"] = torch.ones(OUT, dtype=dtype)
    return {f"m.up.{name}": tensor for name, tensor in tensors.items()}


def check(path, tensors: dict, bias: bool = True) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    layers = group_layers(read_headers([str(path)]))
    check_layer("m.up", layers["m.up"], OUT, IN, bias)
    check_masks(layers, {"m.up": IN}, {})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("bias", [False, True])
def test_accepts_a_good_layer(path, dtype: torch.dtype, rank: int, bias: bool) -> None:
    check(path, layer_tensors(dtype, rank, bias), bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_on_disk(path, dtype: torch.dtype) -> None:
    """A bit a weight (rows padded to bytes) plus a value for every nonzero, factor entry and bias."""
    tensors = layer_tensors(dtype)
    save_file(tensors, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    floats = len(tensors["m.up.values"]) + RANK * (IN + OUT) + OUT
    assert path.stat().st_size - 8 - header == OUT * -(-IN // 8) + floats * dtype.itemsize


def test_groups_layers_and_reads_headers_over_shards(tmp_path) -> None:
    tensors = layer_tensors() | {"m.norm.weight": torch.ones(4), "m.down.weight": torch.ones(2, 2)}
    first = {name: tensors.pop(name) for name in ("m.up.values", "m.up.A", "m.norm.weight")}
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(first, files[0])
    save_file(tensors, files[1])
    entries = read_headers(map(str, files))
    layers = group_layers(entries)
    assert layers.keys() == {"m.up"}
    assert layers["m.up"].keys() == {"mask", "values", "A", "B", "bias", "weight"}
    assert (layers["m.up"]["A"].file, layers["m.up"]["B"].file) == tuple(map(str, files))
    assert entries["m.up.mask"].shape == (OUT, 2) and entries["m.up.mask"].dtype == "U8"
    check_layer("m.up", layers["m.up"], OUT, IN, bias=True)


BROKEN = [  # (tensor, what becomes of it)
    *((name, "missing", None) for name in ("mask", "values", "bias", "weight", "A", "B")),
    *(
        (name, "of shape 4 x 4", lambda t: torch.ones(4, 4, dtype=t.dtype))
        for name in ("mask", "values", "B", "bias", "weight")
    ),
    *((name, "integers", torch.Tensor.int) for name in ("mask", "values", "A", "B", "bias", "weight")),
    ("A", "narrow", lambda t: t[:, :-1]),
    ("mask", "narrow", lambda t: t[:, :1]),
    ("mask", "short", lambda t: t[:-1]),
    ("mask", "floats", torch.Tensor.float),
    ("mask", "with bits beyond the inputs", lambda t: t | 0x80),
    ("A", "of another dtype", torch.Tensor.half),
    ("B", "of another dtype", torch.Tensor.half),
    ("values", "one short", lambda t: t[:-1]),
    ("values", "one too many", lambda t: torch.cat([t, t[:1]])),
    ("values", "a scalar", lambda t: t[0]),
]


@pytest.mark.parametrize(
    ("name", "make"), [pytest.param(name, make, id=f"{name} {what}") for name, what, make in BROKEN]
)
def test_refuses_a_broken_layer(path, name: str, make) -> None:
    tensors = layer_tensors()
    tensor = tensors.pop(f"m.up.{name}")
    if make:
        tensors[f"m.up.{name}"] = make(tensor)
    with pytest.raises(FormatError) as caught:
        check(path, tensors)
    assert str(path) in str(caught.value) and f"m.up.{name} " in str(caught.value)


def test_refuses_a_mask_that_disagrees_with_the_values(path) -> None:
    tensors = layer_tensors()
    tensors["m.up.mask"] = torch.zeros_like(tensors["m.up.mask"])
    with pytest.raises(FormatError, match=r"m\.up\.values holds \d+ values, but the mask keeps 0"):
        check(path, tensors)


def test_refuses_an_unexpected_bias(path) -> None:
    with pytest.raises(FormatError, match=r"m\.up\.bias is unexpected") as caught:
        check(path, layer_tensors(), bias=False)
    assert str(path) in str(caught.value)


def test_blames_the_shard_that_holds_the_tensor(tmp_path) -> None:
    tensors = layer_tensors()
    values = {"m.up.values": tensors.pop("m.up.values")[:-1]}
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(tensors, files[0])
    save_file(values, files[1])
    layers = group_layers(read_headers(map(str, files)))
    with pytest.raises(FormatError, match=r"m\.up\.values holds") as caught:
        check_masks(layers, {"m.up": IN}, {})
    assert str(files[1]) in str(caught.value)


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_refuses_a_truncated_file(path, left: int) -> None:
    save_file(layer_tensors(), path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(FormatError, match="not a complete safetensors file") as caught:
        read_headers([str(path)])
    assert str(path) in str(caught.value)


def test_refuses_a_tensor_in_two_files(tmp_path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    save_file(layer_tensors(), files[0])
    save_file({"m.up.A": torch.ones(1)}, files[1])
    with pytest.raises(FormatError, match=r"b\.safetensors: tensor m\.up\.A is in .*a\.safetensors too"):
        read_headers(map(str, files))


def test_a_dense_module_may_have_a_tensor_called_mask(path) -> None:
    save_file({"m.mask": torch.ones(2), "m.weight": torch.ones(2, 2), "n.values": torch.ones(2)}, path)
    assert group_layers(read_headers([str(path)])) == {}


def test_refuses_a_mask_that_breaks_its_pattern(path) -> None:
    mask = torch.zeros(OUT, 12, dtype=torch.bool)
    mask[1, 4:7] = True
    packed, values = pack(torch.ones(OUT, 12), mask)
    save_file({"m.up.mask": packed, "m.up.values": values}, path)
    layers = group_layers(read_headers([str(path)]))
    check_masks(layers, {"m.up": 12}, {"m.up": NM(3, 4)})
    with pytest.raises(FormatError, match=r"m\.up\.mask keeps more than 2 of 4 .* against the config's 2:4"):
        check_masks(layers, {"m.up": 12}, {"m.up": NM(2, 4)})


def test_refuses_other_files(tmp_path, path) -> None:
    path.write_bytes(b"not a checkpoint, whatever the name says")
    with pytest.raises(FormatError, match=r"model\.safetensors: not a complete"):
        read_headers([str(path)])
    other = tmp_path / "model.bin"
    other.write_bytes(b"")
    with pytest.raises(FormatError, match=r"model\.bin: .*\.safetensors"):
        read_headers([str(other)])
