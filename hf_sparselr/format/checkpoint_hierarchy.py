"""The tensors of a hierarchical part in a checkpoint, `L.hierarchy.A` and so on: checked, and their shape read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import safe_open

from .hierarchy import FLOAT_PARTS, ORDER_PARTS, PARTS, HierarchyShape

PREFIX = "hierarchy"
NAMES = tuple(f"{PREFIX}.{part}" for part in PARTS)  # below a layer


def read_shape(parts: Mapping[str, Any], out_features: int, in_features: int) -> HierarchyShape | None:
    """How a checked layer's low-rank part is split; None where it is flat. (`parts`: as for `check`.)"""
    if f"{PREFIX}.ranks" not in parts:
        return None
    ranks = _read(parts[f"{PREFIX}.ranks"]).tolist()
    return HierarchyShape(out_features, in_features, tuple(ranks))


def check(
    parts: Mapping[str, Any],
    out_features: int,
    in_features: int,
    fail: Callable[[str, str], None],
) -> None:
    """Checks the hierarchical part of a layer, its permutation included.

    Args:
        parts: {"values": entry, "hierarchy.A": entry, ...}, see `checkpoint.Entry`.
        fail: (part, problem) -> raises FormatError.
    """
    present = [name for name in NAMES if name in parts]
    if not present:
        return
    for part in (*FLOAT_PARTS, "ranks"):
        if f"{PREFIX}.{part}" not in parts:
            fail(f"{PREFIX}.{part}", "is missing: the parts of a hierarchy come together")
    orders = [f"{PREFIX}.{part}" for part in ORDER_PARTS]
    for name in orders if any(name in parts for name in orders) else ():
        if name not in parts:
            fail(name, "is missing: row_order and column_order come in pairs")
    for name in present:
        floating = name.rpartition(".")[2] in FLOAT_PARTS
        wanted = parts["values"].dtype if floating else "I32"
        if parts[name].dtype != wanted:
            reason = "that of the values" if floating else "integers"
            fail(name, f"has dtype {parts[name].dtype}, expected {wanted}, {reason}")
    shape = _checked_shape(parts, out_features, in_features, fail)
    for part, size in shape.sizes.items():
        name = f"{PREFIX}.{part}"
        if name in parts and parts[name].shape != size:
            fail(name, f"has shape {parts[name].shape}, expected {size}")
    for name in orders:
        if name in parts and not _is_permutation(_read(parts[name])):
            fail(name, f"is no permutation of 0 to {parts[name].shape[0] - 1}")


def _checked_shape(
    parts: Mapping[str, Any], out_features: int, in_features: int, fail: Callable[[str, str], None]
) -> HierarchyShape:
    name = f"{PREFIX}.ranks"
    if len(parts[name].shape) != 1 or not parts[name].shape[0]:
        fail(name, f"has shape {parts[name].shape}, expected one rank a level")
    shape = HierarchyShape(out_features, in_features, tuple(_read(parts[name]).tolist()))
    problem = "every rank must be at least 1" if min(shape.ranks) < 1 else shape.problem()
    if problem:
        fail(name, f"holds {list(shape.ranks)}: {problem}")
    return shape


def _is_permutation(order: torch.Tensor) -> bool:
    return torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype))


def _read(entry: Any) -> torch.Tensor:
    with safe_open(entry.file, framework="pt") as reader:
        return reader.get_tensor(entry.name)


def owner(name: str) -> str:
    """The module, or packed layer, that a tensor of this name belongs to."""
    return name.rpartition(".")[0].removesuffix(f".{PREFIX}")
