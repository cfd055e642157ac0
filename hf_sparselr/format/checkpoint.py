"""The packed form of a sparse matrix, and the on-disk format.

Format, version 1. A compressed layer `L` with weight (out, in) is stored as

    L.mask    uint8 (out, ceil(in / 8))  bit i of a row (least significant first) says that input i is kept
    L.values  float (nonzeros,)          the kept values, row after row
    L.A       float (rank, in)           absent at rank 0
    L.B       float (out, rank)          absent at rank 0
    L.bias    float (out,)               only if the layer has one
    L.weight  float (0,)                 no data: makes transformers refuse the file where this package is missing

All floats have one dtype. config.json carries `quantization_config` with `quant_method: "sparselr"` and
`format_version`. Bytes: 1 bit a weight (rows padded to whole bytes) plus one value a nonzero and a factor entry.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from .bitmask import unpack_mask

PAYLOAD = ("mask", "values", "A", "B", "bias")
SENTINEL = "weight"
_FLOATS = ("F64", "F32", "F16", "BF16")


class FormatError(ValueError):
    """A packed checkpoint that is incomplete or contradicts itself; names the file and the tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, from the header of its file."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(files: Iterable[str]) -> dict[str, Entry]:
    """Names, shapes and dtypes of all tensors in safetensors files, without reading the data.

    Raises:
        FormatError: a file is not safetensors, or truncated.
    """
    entries = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise FormatError(f"{file}: a compressed checkpoint is stored in .safetensors files")
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    piece = reader.get_slice(name)
                    entries[name] = Entry(str(file), tuple(piece.get_shape()), piece.get_dtype())
        except SafetensorError as error:
            raise FormatError(f"{file}: not a complete safetensors file ({error})") from error
    return entries


def group_layers(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The packed layers of a checkpoint: {layer: {"mask": entry, "values": entry, ...}}."""
    layers = {}
    for name in entries:
        layer, _, leaf = name.rpartition(".")
        if leaf in ("mask", "values") and layer not in layers:
            layers[layer] = {
                part: entries[f"{layer}.{part}"]
                for part in (*PAYLOAD, SENTINEL)
                if f"{layer}.{part}" in entries
            }
    return layers


def check_layer(
    layer: str, parts: Mapping[str, Entry], out_features: int, in_features: int, bias: bool
) -> None:
    """Checks one packed layer against the shape of the linear layer it stands for, and its mask against its values.

    Raises:
        FormatError: naming file and tensor.
    """
    where = next(iter(parts.values())).file

    def fail(part: str, problem: str) -> None:
        raise FormatError(f"{parts[part].file if part in parts else where}: tensor {layer}.{part} {problem}")

    for part in ("mask", "values", SENTINEL, *(("bias",) if bias else ())):
        if part not in parts:
            fail(part, "is missing")
    if not bias and "bias" in parts:
        fail("bias", "is unexpected: the model's layer has no bias")
    if ("A" in parts) != ("B" in parts):
        fail("A" if "B" in parts else "B", "is missing: the factors come in pairs")
    rank = parts["A"].shape[0] if "A" in parts and parts["A"].shape else 0
    expected = {
        "mask": (out_features, -(-in_features // 8)),
        "values": (parts["values"].shape[0] if parts["values"].shape else -1,),
        "A": (rank, in_features),
        "B": (out_features, rank),
        "bias": (out_features,),
        SENTINEL: (0,),
    }
    for part, entry in parts.items():
        if entry.shape != expected[part]:
            fail(part, f"has shape {entry.shape}, expected {expected[part]}")
        if part == "mask" and entry.dtype != "U8":
            fail(part, f"has dtype {entry.dtype}, expected U8")
        if part != "mask" and entry.dtype not in _FLOATS:
            fail(part, f"has dtype {entry.dtype}, expected one of {', '.join(_FLOATS)}")
        if part in ("A", "B") and entry.dtype != parts["values"].dtype:
            fail(part, f"has dtype {entry.dtype}, but the values have {parts['values'].dtype}")
    with safe_open(parts["mask"].file, framework="pt") as reader:
        mask = unpack_mask(reader.get_tensor(f"{layer}.mask"), expected["mask"][1] * 8)
    if mask[:, in_features:].any():
        fail("mask", f"has bits set beyond the layer's {in_features} inputs")
    kept = int(mask.sum())
    if kept != parts["values"].shape[0]:
        fail("values", f"holds {parts['values'].shape[0]} values, but the mask keeps {kept}")
