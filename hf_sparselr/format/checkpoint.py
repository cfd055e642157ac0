"""Reads packed layers from the headers of safetensors files, and checks them; README.md describes the format."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import checkpoint_hierarchy
from .bitmask import count_kept
from .patterns import NM

QUANT_METHOD = "sparselr"
FORMAT_VERSION = 1
CONFIG, SETTINGS = "config.json", "quantization_config"
PACKED_LAYERS = "packed_layers"  # key in it: the names of the packed layers, as patterns (see `layer_names`)
PAYLOAD = ("mask", "values", "A", "B", "bias", *checkpoint_hierarchy.NAMES)
SENTINEL = "weight"
FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}
DTYPES |= {"I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}


class FormatError(ValueError):
    """A packed checkpoint that is incomplete or contradicts itself; names the file and the tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, from the header of its file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    name: str = field(default="", compare=False)  # of the tensor in its file


def read_headers(files: Iterable[str]) -> dict[str, Entry]:
    """Names, shapes and dtypes of all tensors in safetensors files, without reading the data.

    Raises:
        FormatError: a file is not safetensors, or truncated, or holds a tensor that another one holds too.
    """
    entries: dict[str, Entry] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise FormatError(f"{file}: a compressed checkpoint is stored in .safetensors files")
        with _reader(file) as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                if name in entries:
                    raise FormatError(f"{file}: tensor {name} is in {entries[name].file} too")
                piece = reader.get_slice(name)
                entries[name] = Entry(str(file), tuple(piece.get_shape()), piece.get_dtype(), name)
    return entries


def group_layers(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The packed layers of a checkpoint: {layer: {"mask": entry, "values": entry, ...}}.

    A layer is packed if it has a `weight` without data, or both a mask and values.
    """
    layers = {}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        packed = leaf == "mask" and f"{layer}.values" in entries
        if (packed or (leaf == SENTINEL and entry.shape == (0,))) and layer not in layers:
            layers[layer] = {
                part: entries[f"{layer}.{part}"] for part in (*PAYLOAD, SENTINEL) if f"{layer}.{part}" in entries
            }
    return layers


def check_layer(layer: str, parts: Mapping[str, Entry], out_features: int, in_features: int, bias: bool) -> None:
    """Checks the header of a packed layer against the shape of the linear layer it stands for.

    Raises:
        FormatError: naming file and tensor.
    """

    def fail(part: str, problem: str) -> None:
        raise _error(layer, parts, part, problem)

    for part in ("mask", "values", SENTINEL, *(("bias",) if bias else ())):
        if part not in parts:
            fail(part, "is missing")
    if not bias and "bias" in parts:
        fail("bias", "is unexpected: the model's layer has no bias")
    if ("A" in parts) != ("B" in parts):
        fail("A" if "B" in parts else "B", "is missing: the factors come in pairs")
    rank = layer_rank(parts)
    expected = {
        "mask": (out_features, -(-in_features // 8)),
        "values": (parts["values"].shape[0] if parts["values"].shape else -1,),
        "A": (rank, in_features),
        "B": (out_features, rank),
        "bias": (out_features,),
        SENTINEL: (0,),
    }
    checkpoint_hierarchy.check(parts, out_features, in_features, fail)
    for part, entry in parts.items():
        if part in checkpoint_hierarchy.NAMES:
            continue
        if entry.shape != expected[part]:
            fail(part, f"has shape {entry.shape}, expected {expected[part]}")
        if part == "mask" and entry.dtype != "U8":
            fail(part, f"has dtype {entry.dtype}, expected U8")
        if part != "mask" and entry.dtype not in FLOATS:
            fail(part, f"has dtype {entry.dtype}, expected one of {', '.join(FLOATS)}")
        if part in ("A", "B") and entry.dtype != parts["values"].dtype:
            fail(part, f"has dtype {entry.dtype}, but the values have {parts['values'].dtype}")


def check_masks(
    layers: Mapping[str, Mapping[str, Entry]], columns: Mapping[str, int], patterns: Mapping[str, NM]
) -> None:
    """Reads the masks of layers and checks them against their numbers of inputs and values, and their patterns.

    Args:
        layers: see `group_layers`; their headers were checked.
        columns: inputs of every layer.
        patterns: of the layers that have an N:M pattern.

    Raises:
        FormatError: naming file and tensor.
    """
    for file in sorted({parts["mask"].file for parts in layers.values()}):
        with _reader(file) as reader:
            for layer, parts in layers.items():
                if parts["mask"].file == file:
                    mask = reader.get_tensor(f"{layer}.mask")
                    _check_mask(layer, parts, mask, columns[layer], patterns.get(layer))


def layer_rank(parts: Mapping[str, Entry]) -> int:
    """The rank of a packed layer by the shape of its A; 0 without one."""
    return parts["A"].shape[0] if "A" in parts and parts["A"].shape else 0


def _check_mask(layer: str, parts: Mapping[str, Entry], mask: torch.Tensor, columns: int, pattern: NM | None) -> None:
    if columns % 8 and (mask[:, -1] >> columns % 8).any():
        raise _error(layer, parts, "mask", f"has bits set beyond the layer's {columns} inputs")
    kept, obeys = count_kept(mask, columns, pattern)
    if kept != parts["values"].shape[0]:
        problem = f"holds {parts['values'].shape[0]} values, but the mask keeps {kept}"
        raise _error(layer, parts, "values", problem)
    if not obeys:
        problem = f"keeps more than {pattern.n} of {pattern.m} consecutive inputs, against the config's {pattern}"
        raise _error(layer, parts, "mask", problem)


def _error(layer: str, parts: Mapping[str, Entry], part: str, problem: str) -> FormatError:
    file = (parts[part] if part in parts else next(iter(parts.values()))).file
    return FormatError(f"{file}: tensor {layer}.{part} {problem}")


def _reader(file: str | Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise FormatError(f"{file}: not a complete safetensors file ({error})") from error
