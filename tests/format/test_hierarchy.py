"""The hierarchical form: what it means, its sizes, and checkpoints that hold it."""

import pytest
import torch
from helpers.hierarchies import SHAPES, by_entries, random_hierarchy
from safetensors.torch import save_file

from hf_sparselr.format.bitmask import pack
from hf_sparselr.format.checkpoint import FormatError, check_layer, group_layers, read_headers
from hf_sparselr.format.checkpoint_hierarchy import read_shape
from hf_sparselr.format.hierarchy import HierarchyShape

SHAPE = HierarchyShape(24, 40, (3, 2))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_equals_the_definition(shape, permuted: bool) -> None:
    hierarchy = random_hierarchy(shape, permuted)
    torch.testing.assert_close(hierarchy.dense(), by_entries(hierarchy))


def test_one_level_is_two_leaves_and_two_products() -> None:
    h = random_hierarchy(HierarchyShape(12, 20, (3,)), permuted=False)
    top = torch.cat([h.leaves[:6], h.B[:6] @ h.A[:, 10:]], 1)
    bottom = torch.cat([h.B[6:] @ h.A[:, :10], h.leaves[6:]], 1)
    torch.testing.assert_close(h.dense(), torch.cat([top, bottom]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_are_what_is_stored(shape) -> None:
    hierarchy = random_hierarchy(shape, permuted=True)
    stored = hierarchy.A.numel() + hierarchy.B.numel() + hierarchy.leaves.numel()
    assert shape.parameters == stored


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (HierarchyShape(8, 8, (1, 1, 1, 1)), "empty leaves"),
        (HierarchyShape(64, 16, (8,)), "rank 8 must be smaller than both sides of level 1's blocks 32 x 8"),
        (HierarchyShape(64, 64, (8, 16)), "level 2's blocks 16 x 16"),
        (HierarchyShape(64, 64, (8, 15)), None),
    ],
)
def test_what_cannot_be_split(shape, problem: str | None) -> None:
    found = shape.problem()
    assert found is None if problem is None else problem in found


# -- in a checkpoint


def tensors(permuted: bool = True) -> dict[str, torch.Tensor]:
    mask = torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    packed, values = pack(torch.ones(24, 40), mask)
    h = random_hierarchy(SHAPE, permuted, torch.float32)
    stored = {"mask": packed, "values": values, "weight": torch.zeros(0)}
    stored |= {f"hierarchy.{part}": getattr(h, part) for part in ("A", "B", "leaves")}
    stored["hierarchy.ranks"] = torch.tensor(SHAPE.ranks, dtype=torch.int32)
    if permuted:
        stored |= {"hierarchy.row_order": h.row_order, "hierarchy.column_order": h.column_order}
    return {f"layer.{name}": tensor for name, tensor in stored.items()}


def check(path, stored: dict[str, torch.Tensor]) -> HierarchyShape | None:
    save_file(stored, path)
    parts = group_layers(read_headers([str(path)]))["layer"]
    check_layer("layer", parts, 24, 40, bias=False)
    return read_shape(parts, 24, 40)


@pytest.mark.parametrize("permuted", [False, True])
def test_accepts_a_good_layer(tmp_path, permuted: bool) -> None:
    assert check(tmp_path / "model.safetensors", tensors(permuted)) == SHAPE


def _swapped(order: torch.Tensor, value: int) -> torch.Tensor:
    order = order.clone()
    order[3] = value
    return order


BROKEN = {
    "row_order": [
        (lambda t: _swapped(t, int(t[4])), "is no permutation of 0 to 23"),
        (lambda t: _swapped(t, 24), "is no permutation"),
        (lambda t: _swapped(t, -1), "is no permutation"),
        (lambda t: t[:-1].clone(), "has shape"),
        (lambda t: t.long(), "expected I32"),
        (lambda t: None, "is missing: row_order and column_order"),
    ],
    "column_order": [
        (lambda t: t * 0, "is no permutation of 0 to 39"),
        (lambda t: None, "is missing: row_order and column_order"),
    ],
    "ranks": [
        (lambda t: None, "is missing"),
        (lambda t: t * 0, "at least 1"),
        (lambda t: t + 20, "must be smaller"),
        (lambda t: t[:0].clone(), "one rank a level"),
        (lambda t: t.float(), "expected I32"),
    ],
    "A": [(lambda t: None, "is missing"), (lambda t: t[:-1].clone(), "has shape")],
    "B": [(lambda t: t.half(), "that of the values"), (lambda t: t[:, :-1].clone(), "has shape")],
    "leaves": [(lambda t: t[:, :-1].clone(), "has shape"), (lambda t: t.int(), "that of the values")],
}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [(part, *case) for part, cases in BROKEN.items() for case in cases],
    ids=[f"{part}-{i}" for part, cases in BROKEN.items() for i in range(len(cases))],
)
def test_refuses_a_broken_layer(tmp_path, part: str, change, message: str) -> None:
    stored = tensors()
    changed = change(stored.pop(f"layer.hierarchy.{part}"))
    if changed is not None:
        stored[f"layer.hierarchy.{part}"] = changed
    file = tmp_path / "model.safetensors"
    with pytest.raises(FormatError, match=f"tensor layer.hierarchy.{part} .*{message}") as error:
        check(file, stored)
    assert str(file) in str(error.value)
