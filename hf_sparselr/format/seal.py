"""The seal of a saved checkpoint: a save id and a checksum for every tensor, in the metadata of its files.

Every file carries the metadata entry `sparselr`, a JSON object:

    save       the save id: 32 hexadecimal digits, the same in all files and in config.json
    checksums  {tensor: CRC-32 of its bytes, 8 hexadecimal digits}, for the tensors of this file
    ranks      {layer: rank}, for layers whose rank is not the one that the config gives them

The save id is a hash of the names, dtypes, shapes and checksums of all tensors, and of the ranks. Two saves of the
same tensors have the same id, however they are sharded. So `check_seal` notices a file of another save, and any
change to a header, without reading the weights; `damaged_tensors` reads them.
"""

import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CONFIG, PACKED_LAYERS, SETTINGS, Entry, FormatError
from .layer_names import compact_names
from .staging import unfinished

METADATA = "sparselr"
SAVE_ID = "save_id"  # its key in the quantization_config of config.json


@dataclass(frozen=True)
class Seal:
    """The `sparselr` metadata of one file."""

    save: str
    checksums: dict[str, str]
    ranks: dict[str, int]


def room(names: Iterable[str]) -> str:
    """Blank metadata that leaves room in a file's header for the seal of tensors of these names."""
    return " " * sum(2 * len(name) + 64 for name in names)


def read_seal(file: str | os.PathLike) -> Seal | None:
    """The seal of a safetensors file, or None if it has none.

    Raises:
        FormatError: its metadata is no seal.
    """
    text = (_header(Path(file))[0].get("__metadata__") or {}).get(METADATA, "").strip()
    if not text:
        return None
    try:
        stored = json.loads(text)
        seal = Seal(str(stored["save"]), dict(stored["checksums"]), dict(stored["ranks"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{file}: its metadata entry {METADATA!r} cannot be read ({error!r})") from error
    return seal


def seal(directory: str | os.PathLike, files: Iterable[str | os.PathLike], ranks: Mapping[str, int]) -> str:
    """Seals the weight files of a checkpoint, and writes the save id and the packed layers into its config.json.

    Engines that serve a model do not open its files: config.json tells them which layers are packed.

    The files are changed in place, so they must not be a checkpoint that is in use.

    Args:
        directory: holds config.json with a `quantization_config`.
        files: all safetensors files of the checkpoint.
        ranks: of layers whose rank is not the one that the config gives them.

    Returns:
        The save id.
    """
    files, ranks = [Path(file) for file in files], dict(sorted(ranks.items()))
    headers = [_header(file) for file in files]
    checksums = [_checksums(file, *header) for file, header in zip(files, headers, strict=True)]
    tensors = {
        name: (tensor["dtype"], tensor["shape"], sums[name])
        for (header, _), sums in zip(headers, checksums, strict=True)
        for name, tensor in _tensors(header).items()
    }
    save = _save_id(tensors, ranks)
    for file, (header, start), sums in zip(files, headers, checksums, strict=True):
        content = {"save": save, "checksums": sums, "ranks": ranks}
        metadata = {
            **(header.get("__metadata__") or {}),
            METADATA: json.dumps(content, separators=(",", ":")),
        }
        _replace_header(file, start, {"__metadata__": dict(sorted(metadata.items())), **_tensors(header)})
    config = Path(directory) / CONFIG
    stored = json.loads(config.read_text(encoding="utf-8"))
    packed = (name.removesuffix(".mask") for name in tensors if name.endswith(".mask"))
    layers = [layer for layer in packed if f"{layer}.values" in tensors]
    stored[SETTINGS] |= {SAVE_ID: save, PACKED_LAYERS: compact_names(layers)}
    config.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return save


def check_seal(entries: Mapping[str, Entry], seals: Mapping[str, Seal | None], save_id: str | None) -> dict[str, int]:
    """Checks from headers that the files of a checkpoint were written by one save, the one of its config.json.

    Files without a seal, beside a config without a save id, are accepted: another program may have written them.

    Args:
        entries: all tensors, see `read_headers`.
        seals: of each file.
        save_id: of config.json, None where it has none.

    Returns:
        Ranks of the layers whose rank is not the one that the config gives them.

    Raises:
        FormatError: naming the file, and the tensor if it is one.
    """
    present = {file: seal for file, seal in seals.items() if seal is not None}
    expected = save_id or next((seal.save for seal in present.values()), None)
    if expected is None:
        return {}
    for file, seal in seals.items():
        if seal is None or seal.save != expected:
            found = "no save id" if seal is None else f"save id {seal.save}"
            source = "config.json" if save_id else "another file"
            raise FormatError(
                f"{file}: has {found}, but {source} has {expected}: the files of this folder come from different "
                f"saves.{_advice(Path(file).parent)}"
            )
    for name, entry in entries.items():
        if name not in present[entry.file].checksums:
            raise FormatError(f"{entry.file}: tensor {name} was added after the checkpoint was saved")
    for file, seal in present.items():
        for name in seal.checksums:
            if name not in entries or entries[name].file != file:
                raise FormatError(f"{file}: tensor {name} is missing")
    ranks = next(iter(present.values())).ranks
    tensors = {name: (entry.dtype, entry.shape, present[entry.file].checksums[name]) for name, entry in entries.items()}
    if _save_id(tensors, ranks) != expected or any(seal.ranks != ranks for seal in present.values()):
        where = Path(next(iter(present))).parent
        raise FormatError(f"{where}: names, dtypes or shapes of tensors were changed after the checkpoint was saved")
    return ranks


def damaged_tensors(file: str | os.PathLike) -> list[str] | None:
    """The tensors of a file whose bytes are not those that were saved; None if the file has no seal."""
    seal = read_seal(file)
    if seal is None:
        return None
    found = _checksums(Path(file), *_header(Path(file)))
    return [name for name, checksum in found.items() if seal.checksums.get(name) != checksum]


def _save_id(tensors: Mapping[str, tuple], ranks: Mapping[str, int]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, (dtype, shape, checksum) in sorted(tensors.items()):
        digest.update(json.dumps([name, dtype, list(shape), checksum]).encode())
    digest.update(json.dumps(ranks, sort_keys=True).encode())
    return digest.hexdigest()


def _header(file: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and the offset of its data."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            return json.loads(stream.read(size)), 8 + size
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{file}: not a complete safetensors file ({error})") from error


def _tensors(header: dict) -> dict[str, dict]:
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _checksums(file: Path, header: dict, start: int) -> dict[str, str]:
    """CRC-32 of the bytes of every tensor, in the order of their names."""
    sums = {}
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        for name, tensor in sorted(_tensors(header).items()):
            first, last = tensor["data_offsets"]
            with view[start + first : start + last] as piece:
                sums[name] = f"{zlib.crc32(piece):08x}"
        view.release()
    return sums


def _replace_header(file: Path, start: int, header: dict) -> None:
    """Writes a header in the place of the one that ends at `start`; without enough room, the file anew."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= start - 8:
        with file.open("r+b") as stream:
            stream.seek(8)
            stream.write(text.ljust(start - 8))
        return
    text = text.ljust(-(-len(text) // 8) * 8)
    moved = file.with_name(f"{file.name}.sealed")
    with file.open("rb") as old, moved.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        old.seek(start)
        shutil.copyfileobj(old, new, 2**24)
    os.replace(moved, file)


def _advice(directory: Path) -> str:
    """How to mend a folder whose files come from two saves, as the end of an error."""
    left = unfinished(directory)
    if left is None:
        return " Save or download it again"
    return (
        f" A save was interrupted here; the rest of its files lies in {left}: move them into {directory}, config.json "
        "last, or save again"
    )
