"""`inspect_checkpoint`: the content of a compressed checkpoint, from config.json and the headers of its files."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download

from ..compression.coverage import LEAST, dense_names, is_coverage, share_line, share_of
from ..compression.report import FILE_NAME, Report, rank_cell, table
from ..config.sparselr_config import QUANT_METHOD, SparseLRConfig
from ..format.checkpoint import (
    CONFIG,
    PAYLOAD,
    SETTINGS,
    Entry,
    FormatError,
    check_layer,
    check_masks,
    group_layers,
    layer_rank,
    read_headers,
)
from ..format.checkpoint_hierarchy import read_shape
from ..format.patterns import NM, Pattern, Unstructured
from ..format.seal import check_seal, damaged_tensors, read_seal
from ..solvers.registry import PRECOMPUTED
from ..utils.public_names import hub_id

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
        coverage: {"packed", "total": numbers of weights of the linear layers in the blocks, "dense": {name of a layer
            that stayed dense: its weights}}, from the report beside the checkpoint; None without it.
        dense: {name of a layer that stayed dense: why}, as far as known.
        save_id: of the save that wrote the files, None where they have none.
        verified: the bytes of all tensors were read and are those that were saved.
    """

    path: str
    format_version: int
    settings: dict
    layers: list[dict]
    totals: dict[str, dict[str, int]]
    coverage: dict | None = None
    dense: dict[str, str] = field(default_factory=dict)
    save_id: str | None = None
    verified: bool = False

    def __str__(self) -> str:
        settings = [f"  {name}: {json.dumps(value)}" for name, value in self.settings.items()]
        head = [f"{self.path}: sparse plus low-rank, format version {self.format_version}", *settings]
        end = ["", "verified: every tensor is as it was saved"] if self.verified else []
        return "\n".join([*head, "", self._layer_table(), "", self._totals_table(), *self._coverage_lines(), *end])

    def _coverage_lines(self) -> list[str]:
        if self.coverage is None:
            return []
        line = share_line(self.coverage)
        if self.coverage["dense"]:
            line += f"; dense stayed {dense_names(self.coverage, self.dense)}"
        return ["", f"warning: only {line}" if share_of(self.coverage) < LEAST else line]

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
                    rank_cell(layer),
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


def inspect_checkpoint(path: str | os.PathLike, verify: bool = False) -> Inspection:
    """Reads the content of a compressed checkpoint; of the weights, only the headers of their files.

    Looks at the files that transformers would load, and checks that they belong together.

    Args:
        path: a directory, or a Hub id, whose config and weights are downloaded.
        verify: also read all tensors, and compare them with the checksums of the save.

    Raises:
        ValueError: the checkpoint is not compressed, of a newer format, incomplete, made of files of several saves,
            or damaged; naming the file, and the tensor if it is one.
        OSError: there is no such directory or Hub repository, or no config.json in it.
    """
    directory = _directory(os.fspath(path))
    model_config = _json(directory / CONFIG)
    config = _config(directory, model_config)
    files = [str(file) for file in _weight_files(directory, model_config)]
    entries = read_headers(files)
    stored = group_layers(entries)
    layers = [_layer(name, parts, config) for name, parts in stored.items()]
    seals = {file: read_seal(file) for file in files}
    check_seal(entries, seals, config.save_id)
    if verify:
        _verify(files, stored, layers, config)
    packed = sum(layer["bytes"] for layer in layers)
    dense = sum(layer["dense_bytes"] for layer in layers)
    rest = sum(map(_payload, map(Path, files))) - packed
    totals = {
        "layers": {"packed": packed, "dense": dense},
        "rest": {"packed": rest, "dense": rest},
        "model": {"packed": packed + rest, "dense": dense + rest},
    }
    save_id = next((seal.save for seal in seals.values() if seal), None)
    found, reasons = _coverage(directory, len(layers))
    version, settings = config.format_version, config.to_dict()
    return Inspection(os.fspath(path), version, settings, layers, totals, found, reasons, save_id, verify)


def _coverage(directory: Path, layers: int) -> tuple[dict | None, dict[str, str]]:
    """From the report, if it is of as many layers and says so."""
    report = Report.load(directory)
    if report is None or len(report.layers) != layers or not is_coverage(report.coverage):
        return None, {}
    return report.coverage, report.dense


def _verify(files: list[str], stored: Mapping[str, Mapping[str, Entry]], layers: list[dict], config) -> None:
    """Raises FormatError for the first file with damaged tensors, or without checksums, and for wrong masks."""
    for file in files:
        damaged = damaged_tensors(file)
        if damaged is None:
            raise FormatError(f"{file}: has no checksums to verify: hf_sparselr did not save it")
        if damaged:
            more = f" ({len(damaged) - 1} more are)" if len(damaged) > 1 else ""
            raise FormatError(f"{file}: tensor {damaged[0]} is damaged: its bytes are not those that were saved{more}")
    asked = {name: config.layer_pattern(name) for name in stored}
    patterns = {name: pattern for name, pattern in asked.items() if isinstance(pattern, NM)}
    check_masks(stored, {layer["name"]: layer["shape"][1] for layer in layers}, patterns)


def _directory(path: str) -> Path:
    if os.path.isdir(path):
        return Path(path)
    if hub_id(path) is None:
        raise FileNotFoundError(f"{path}: no such folder, and no Hub id")
    return Path(snapshot_download(path, allow_patterns=[CONFIG, FILE_NAME, "model*.safetensors", _INDEX]))


def _json(file: Path) -> dict:
    text = file.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected a JSON object")
    return content


def _config(directory: Path, model_config: dict) -> SparseLRConfig:
    file = directory / CONFIG
    stored = model_config.get(SETTINGS) or {}
    if not isinstance(stored, dict):
        raise FormatError(f"{file}: {SETTINGS} is no JSON object")
    method = stored.get("quant_method")
    if method != QUANT_METHOD:
        found = f"quant_method={method!r}" if method else f"no {SETTINGS}"
        raise ValueError(f"{file}: {found}, expected quant_method={QUANT_METHOD!r}: not a compressed checkpoint")
    return SparseLRConfig.from_dict(stored)


def _weight_files(directory: Path, model_config: dict) -> list[Path]:
    """The files that transformers loads: a whole one before shards, whatever else is there."""
    name = model_config.get("transformers_weights") or _WEIGHTS
    if not (directory / name).is_file() and (directory / _INDEX).is_file():
        name = _INDEX
    names = [name]
    if name.endswith(".index.json"):
        weight_map = _json(directory / name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{directory / name}: expected a weight_map from tensors to files")
        names = sorted(set(map(str, weight_map.values())))
    files = [directory / name for name in names]
    for file in files:
        if not file.is_file():
            raise FormatError(f"{file} is missing: a compressed checkpoint is stored in .safetensors files")
    return files


def _payload(file: Path) -> int:
    """Bytes of all tensors in a safetensors file. They follow the header, whose length is in the first 8 bytes."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header


def _layer(name: str, parts: Mapping[str, Entry], config: SparseLRConfig) -> dict:
    for part in ("mask", "values"):
        if part not in parts:
            raise FormatError(f"{next(iter(parts.values())).file}: tensor {name}.{part} is missing")
    if len(parts["mask"].shape) != 2:
        raise FormatError(f"{parts['mask'].file}: tensor {name}.mask has shape {parts['mask'].shape}")
    if len(parts["values"].shape) != 1:
        raise FormatError(f"{parts['values'].file}: tensor {name}.values has shape {parts['values'].shape}")
    pattern = config.layer_pattern(name)
    out_features, in_features = shape = _shape(parts, pattern)
    check_layer(name, parts, out_features, in_features, "bias" in parts)
    nonzeros = parts["values"].shape[0]
    zeros = 1 - nonzeros / (out_features * in_features or 1)
    if isinstance(pattern, Unstructured) and (config.allocation != "uniform" or config.method == PRECOMPUTED):
        pattern = Unstructured(zeros)  # the config knows the mean only
    bias = out_features if "bias" in parts else 0
    return {
        "name": name,
        "shape": list(shape),
        "pattern": str(pattern or "-"),
        "nonzeros": nonzeros,
        "zeros": zeros,
        "rank": layer_rank(parts),
        **_hierarchy(parts, shape),
        "dtype": parts["values"].dtype,
        "bytes": sum(math.prod(parts[part].shape) * _width(parts[part]) for part in PAYLOAD if part in parts),
        "dense_bytes": (out_features * in_features + bias) * _width(parts["values"]),
    }


def _shape(parts: Mapping[str, Entry], pattern: Pattern | None) -> tuple[int, int]:
    """(out, in). At rank 0 only the mask's whole bytes tell `in`, and the nonzeros which of 8 numbers it is.

    Where the config does not know the layer's number of nonzeros, `in` counts as a multiple of 8.
    """
    out_features, columns = parts["mask"].shape
    for factor in ("A", "hierarchy.A"):
        if factor in parts and len(parts[factor].shape) == 2:
            return out_features, parts[factor].shape[1]
    widest = 8 * columns
    for in_features in range(widest, widest - 8, -1):
        shape = (out_features, in_features)
        if pattern and pattern.fits(shape) and pattern.kept(shape) == parts["values"].shape[0]:
            return shape
    return out_features, widest


def _hierarchy(parts: Mapping[str, Entry], shape: tuple[int, int]) -> dict:
    found = read_shape(parts, *shape)
    if found is None:
        return {}
    return {"ranks": list(found.ranks), "leaf": list(found.leaf), "permuted": "hierarchy.row_order" in parts}


def _width(entry: Entry) -> int:
    """Bytes an element of the dtypes that the format knows: U8, I32, F16, BF16, F32, F64."""
    return int(entry.dtype.lstrip("BFUI")) // 8
