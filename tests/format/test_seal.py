"""The seal of a checkpoint: what changes it, what it notices."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparselr.format.checkpoint import FormatError, read_headers
from hf_sparselr.format.seal import METADATA, check_seal, damaged_tensors, read_seal, room, seal

TENSORS = {
    "m.up.mask": torch.tensor([[3], [5]], dtype=torch.uint8),
    "m.up.values": torch.tensor([1.0, -2.0, 3.0, 0.5]),
    "m.up.weight": torch.zeros(0),
    "m.norm.weight": torch.arange(5).bfloat16(),
}


def write(folder: Path, *files: dict, ranks: dict | None = None, with_room: bool = True) -> list[str]:
    """Writes and seals a checkpoint of these files; their paths."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "sparselr"}}')
    paths = [folder / f"model-{number}.safetensors" for number in range(len(files))]
    for path, tensors in zip(paths, files, strict=True):
        metadata = {"format": "pt", **({METADATA: room(tensors)} if with_room else {})}
        save_file(tensors, path, metadata=metadata)
    seal(folder, paths, ranks or {})
    return list(map(str, paths))


def save_id(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["save_id"]


def check(paths: list[str], stored: str | None) -> dict[str, int]:
    return check_seal(read_headers(paths), {path: read_seal(path) for path in paths}, stored)


@pytest.mark.parametrize("with_room", [True, False])
def test_sealing_changes_no_tensor(tmp_path, with_room):
    (path,) = write(tmp_path, TENSORS, with_room=with_room, ranks={"m.up": 3})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(path, framework="pt") as reader:
        assert reader.metadata()["format"] == "pt"
    found = read_seal(path)
    assert found.checksums.keys() == TENSORS.keys() and found.ranks == {"m.up": 3}
    assert found.save == save_id(tmp_path) and re.fullmatch("[0-9a-f]{32}", found.save)
    assert check([path], found.save) == {"m.up": 3}
    assert damaged_tensors(path) == []
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == ["model-0.safetensors"]


def test_there_is_room_for_the_seal_in_the_header(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt", METADATA: room(TENSORS)})
    size = (tmp_path / "x.safetensors").stat().st_size
    (path,) = write(tmp_path, TENSORS)
    assert Path(path).stat().st_size == size


def test_the_same_tensors_have_the_same_id_however_they_are_sharded(tmp_path):
    half = dict(list(TENSORS.items())[:2])
    rest = {name: tensor for name, tensor in TENSORS.items() if name not in half}
    (path,) = write(tmp_path / "one", TENSORS)
    (again,) = write(tmp_path / "again", TENSORS)
    write(tmp_path / "two", half, rest)
    assert Path(path).read_bytes() == Path(again).read_bytes()
    assert save_id(tmp_path / "one") == save_id(tmp_path / "two")


OTHERS = {
    "a value": {**TENSORS, "m.norm.weight": TENSORS["m.norm.weight"] + 1},
    "a dtype": {**TENSORS, "m.norm.weight": TENSORS["m.norm.weight"].view(torch.float16)},
    "a shape": {**TENSORS, "m.up.values": TENSORS["m.up.values"].view(2, 2)},
    "a name": {("m.norm.bias" if name == "m.norm.weight" else name): t for name, t in TENSORS.items()},
    "one more": {**TENSORS, "m.bias": torch.ones(1)},
}


@pytest.mark.parametrize("tensors", OTHERS.values(), ids=OTHERS)
def test_other_tensors_have_another_id(tmp_path, tensors):
    write(tmp_path / "one", TENSORS)
    write(tmp_path / "other", tensors)
    assert save_id(tmp_path / "one") != save_id(tmp_path / "other")


def test_ranks_are_part_of_the_id(tmp_path):
    write(tmp_path / "one", TENSORS)
    write(tmp_path / "other", TENSORS, ranks={"m.up": 1})
    assert save_id(tmp_path / "one") != save_id(tmp_path / "other")


@pytest.mark.parametrize("tensors", OTHERS.values(), ids=OTHERS)
def test_a_header_that_changed_is_refused(tmp_path, tensors):
    """The file has other tensors than its seal says; values are not read."""
    (path,) = write(tmp_path, TENSORS)
    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
    save_file(tensors, path, metadata=metadata)
    if tensors is OTHERS["a value"]:
        assert check([path], save_id(tmp_path)) == {} and damaged_tensors(path) == ["m.norm.weight"]
        return
    with pytest.raises(FormatError, match=r"missing|added after|were changed after"):
        check([path], save_id(tmp_path))


def test_every_flipped_bit_of_the_data_is_found(tmp_path):
    (path,) = write(tmp_path, TENSORS)
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for bit in range(8 * start, 8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        Path(path).write_bytes(changed)
        assert len(damaged_tensors(path)) == 1


def test_files_of_two_saves_are_refused(tmp_path):
    half = dict(list(TENSORS.items())[:2])
    rest = {name: tensor for name, tensor in TENSORS.items() if name not in half}
    first, second = write(tmp_path / "one", half, rest)
    (_, other) = write(tmp_path / "other", half, {**rest, "m.norm.weight": torch.zeros(5)})
    with pytest.raises(FormatError, match=rf"^{re.escape(other)}: has save id .* but config\.json has"):
        check([first, other], save_id(tmp_path / "one"))
    with pytest.raises(FormatError, match=rf"^{re.escape(other)}: has save id .* but another file has"):
        check([first, other], None)
    with pytest.raises(FormatError, match=rf"^{re.escape(first)}: has save id"):
        check([first, second], save_id(tmp_path / "other"))


def test_unsealed_files_need_an_unsealed_config(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file(TENSORS, path)
    assert read_seal(path) is None and damaged_tensors(path) is None
    assert check([path], None) == {}
    with pytest.raises(FormatError, match=r"has no save id, but config\.json has 0123: .*different saves"):
        check([path], "0123")


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"save": "x"}', '{"save": 1, "checksums": 2, "ranks": 3}'])
def test_metadata_that_is_no_seal_is_refused(tmp_path, text):
    path = str(tmp_path / "model.safetensors")
    save_file(TENSORS, path, metadata={METADATA: text})
    with pytest.raises(FormatError, match=rf"^{re.escape(path)}: its metadata entry 'sparselr' cannot be read"):
        read_seal(path)
