"""What a compressed checkpoint holds, read from config.json and the headers of its files."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from ..compression.report import table
from ..config.sparselr_config import QUANT_METHOD, SparseLRConfig
from ..format.checkpoint import PAYLOAD, Entry, FormatError, group_layers, read_headers
from ..format.patterns import Pattern, Unstructured
from ..solvers.registry import PRECOMPUTED

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"


@dataclass(frozen=True)
class Inspection:
    """A compressed checkpoint.

    Attributes:
        path: as it was asked for.
        format_version: of the packed format.
        settings: the config as stored in config.json.
        layers: a dict a packed layer: name, shape (out, in), pattern, nonzeros, zeros (share of S), rank, dtype,
            bytes (packed, with factors and bias), dense_bytes (weight and bias in the same dtype).
        totals: {"layers", "rest", "model"}, each {"packed": bytes, "dense": bytes}; the rest of the model is stored
            as it was.
    """

    path: str
    format_version: int
    settings: dict
    layers: list[dict]
    totals: dict[str, dict[str, int]]

    def __str__(self) -> str:
        settings = [f"  {name}: {json.dumps(value)}" for name, value in self.settings.items()]
        head = [f"{self.path}: sparse plus low-rank, format version {self.format_version}", *settings]
        return "\n".join([*head, "", self._layer_table(), "", self._totals_table()])

    def _layer_table(self) -> str:
        rows = [("layer", "shape", "pattern", "nonzeros", "zeros", "rank", "dtype", "bytes", "dense bytes")]
        for layer in self.layers:
            rows.append(
                (
                    layer["name"],
                    "x".join(map(str, layer["shape"])),
                    layer["pattern"],
                    f"{layer['nonzeros']:,}",
                    f"{layer['zeros']:.4f}",
                    str(layer["rank"]),
                    layer["dtype"],
                    f"{layer['bytes']:,}",
                    f"{layer['dense_bytes']:,}",
                )
            )
        return table(rows)

    def _totals_table(self) -> str:
        names = {"layers": f"{len(self.layers)} packed layers", "rest": "rest of the model", "model": "model"}
        rows = [("total", "bytes", "dense bytes", "share")]
        for key, name in names.items():
            packed, dense = self.totals[key]["packed"], self.totals[key]["dense"]
            share = f"{packed / dense:.4f}" if dense else "-"
            rows.append((name, f"{packed:,}", f"{dense:,}", share))
        return table(rows)


def inspect_checkpoint(path: str | os.PathLike) -> Inspection:
    """Reads what a compressed checkpoint holds; of the weights only the files' headers.

    Args:
        path: a directory, or a Hub id, whose config and weights are downloaded.

    Raises:
        ValueError: the checkpoint is not compressed, of a newer format, or incomplete; naming the file.
        OSError: there is no such directory or Hub repository, or no config.json in it.
    """
    directory = _directory(os.fspath(path))
    config = _config(directory)
    files = _weight_files(directory)
    entries = read_headers(files)
    layers = [_layer(name, parts, config) for name, parts in group_layers(entries).items()]
    packed = sum(layer["bytes"] for layer in layers)
    dense = sum(layer["dense_bytes"] for layer in layers)
    rest = sum(map(_payload, files)) - packed
    totals = {
        "layers": {"packed": packed, "dense": dense},
        "rest": {"packed": rest, "dense": rest},
        "model": {"packed": packed + rest, "dense": dense + rest},
    }
    return Inspection(os.fspath(path), config.format_version, config.to_dict(), layers, totals)


def _directory(path: str) -> Path:
    if os.path.isdir(path):
        return Path(path)
    return Path(snapshot_download(path, allow_patterns=["config.json", "model*.safetensors", _INDEX]))


def _config(directory: Path) -> SparseLRConfig:
    file = directory / "config.json"
    stored = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
    method = stored.get("quant_method")
    if method != QUANT_METHOD:
        found = f"quant_method={method!r}" if method else "no quantization_config"
        raise ValueError(
            f"{file}: {found}, expected quant_method={QUANT_METHOD!r}: not a compressed checkpoint"
        )
    return SparseLRConfig.from_dict(stored)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    names = {_WEIGHTS}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FormatError(f"{file} is missing: a compressed checkpoint is stored in .safetensors files")
    return files


def _payload(file: Path) -> int:
    """Bytes of all tensors in a safetensors file: what follows the header, whose length the first 8 bytes tell."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header


def _layer(name: str, parts: Mapping[str, Entry], config: SparseLRConfig) -> dict:
    for part in ("mask", "values"):
        if part not in parts:
            raise FormatError(f"{next(iter(parts.values())).file}: tensor {name}.{part} is missing")
    pattern = config.layer_pattern(name)
    out_features, in_features = shape = _shape(parts, pattern)
    nonzeros = parts["values"].shape[0]
    zeros = 1 - nonzeros / (out_features * in_features)
    if isinstance(pattern, Unstructured) and (config.allocation != "uniform" or config.method == PRECOMPUTED):
        pattern = Unstructured(zeros)  # the config knows the mean only
    bias = out_features if "bias" in parts else 0
    return {
        "name": name,
        "shape": list(shape),
        "pattern": str(pattern or "-"),
        "nonzeros": nonzeros,
        "zeros": zeros,
        "rank": parts["A"].shape[0] if "A" in parts else 0,
        "dtype": parts["values"].dtype,
        "bytes": sum(math.prod(parts[part].shape) * _width(parts[part]) for part in PAYLOAD if part in parts),
        "dense_bytes": (out_features * in_features + bias) * _width(parts["values"]),
    }


def _shape(parts: Mapping[str, Entry], pattern: Pattern | None) -> tuple[int, int]:
    """(out, in). At rank 0 only the mask's whole bytes tell `in`, and the nonzeros which of 8 numbers it is.

    Where the config does not know the layer's number of nonzeros, `in` counts as a multiple of 8.
    """
    out_features, columns = parts["mask"].shape
    if "A" in parts:
        return out_features, parts["A"].shape[1]
    widest = 8 * columns
    for in_features in range(widest, widest - 8, -1):
        shape = (out_features, in_features)
        if pattern and pattern.fits(shape) and pattern.kept(shape) == parts["values"].shape[0]:
            return shape
    return out_features, widest


def _width(entry: Entry) -> int:
    """Bytes an element of the dtypes that the format knows: U8, F16, BF16, F32, F64."""
    return int(entry.dtype.lstrip("BFU")) // 8
