"""Small compressed checkpoints, and damage to them: what can happen to files, chosen by a random generator."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparselr import compress

from . import tiny

INDEX = "model.safetensors.index.json"
REPORT = "sparselr_report.json"


def compressed(seed: int = 0, **changes):
    """A compressed Llama with random weights; another seed gives other weights of the same shapes."""
    model = tiny.build("llama", attention_bias=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return compress(model, tiny.settings(overrides={"k_proj": {"rank": 0}}, **changes))


@dataclass
class Checkpoint:
    """A copy of a checkpoint that is to be damaged, and another save of a model of the same shapes."""

    folder: Path
    other: Path
    random: random.Random

    def file(self) -> Path:
        return self.random.choice(sorted(self.folder.glob("*.safetensors")))

    def rewrite(self, file: Path, change: Callable[[dict], None]) -> None:
        """Changes the tensors of a file, and keeps its metadata."""
        with safe_open(file, framework="pt") as reader:
            metadata = reader.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        if self.random.random() < 0.2:
            metadata = {"format": "pt"}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)

    def edit(self, name: str, change: Callable[[dict], None]) -> None:
        """Changes a JSON file."""
        path = self.folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def _data(file: Path) -> tuple[int, int]:
    """Where the data of a safetensors file begin and end."""
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    return start, file.stat().st_size


def _overwrite(file: Path, at: int, mask: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ mask]))


def flip_payload(checkpoint: Checkpoint) -> None:
    file = checkpoint.file()
    for _ in range(checkpoint.random.choice((1, 1, 2, 8))):
        _overwrite(file, checkpoint.random.randrange(*_data(file)), 1 << checkpoint.random.randrange(8))


def flip_header(checkpoint: Checkpoint) -> None:
    file = checkpoint.file()
    for _ in range(checkpoint.random.choice((1, 1, 3))):
        mask = checkpoint.random.choice((1, 2, 4, 16, 32))
        _overwrite(file, checkpoint.random.randrange(_data(file)[0]), mask)


def truncate(checkpoint: Checkpoint) -> None:
    file = checkpoint.file()
    file.write_bytes(file.read_bytes()[: checkpoint.random.randrange(file.stat().st_size)])


def lengthen(checkpoint: Checkpoint) -> None:
    with checkpoint.file().open("ab") as stream:
        stream.write(bytes(checkpoint.random.randrange(1, 40)))


def zero_a_page(checkpoint: Checkpoint) -> None:
    file = checkpoint.file()
    data = bytearray(file.read_bytes())
    at = checkpoint.random.randrange(len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    file.write_bytes(data)


def drop_tensors(checkpoint: Checkpoint) -> None:
    def change(tensors: dict) -> None:
        for name in checkpoint.random.sample(sorted(tensors), checkpoint.random.choice((1, 1, 2))):
            del tensors[name]

    checkpoint.rewrite(checkpoint.file(), change)


def change_a_tensor(checkpoint: Checkpoint) -> None:
    def change(tensors: dict) -> None:
        name = checkpoint.random.choice(sorted(tensors))
        tensor = tensors[name]
        ways = [
            lambda: tensor.half() if tensor.is_floating_point() else tensor.int(),
            lambda: tensor.int() if tensor.is_floating_point() else tensor.float(),
            lambda: tensor[:-1] if tensor.ndim else tensor[None],
            lambda: tensor[..., :-1] if tensor.ndim else tensor[None],
            lambda: torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor[None],
            lambda: tensor[None],
            lambda: tensor.flatten(),
            lambda: tensor.flip(0) if tensor.ndim else tensor + 1,
            lambda: torch.zeros_like(tensor),
            lambda: tensor.bool(),
            lambda: tensor.double() if tensor.is_floating_point() else tensor.long(),
            lambda: tensor.T if tensor.ndim == 2 else tensor[:0] if tensor.ndim else tensor + 1,
        ]
        tensors[name] = checkpoint.random.choice(ways)()

    checkpoint.rewrite(checkpoint.file(), change)


def narrow_the_factors(checkpoint: Checkpoint) -> None:
    def change(tensors: dict) -> None:
        layers = [name.removesuffix(".A") for name in sorted(tensors) if name.endswith(".A")]
        layers = [layer for layer in layers if f"{layer}.B" in tensors]
        if layers:
            layer = checkpoint.random.choice(layers)
            rank = checkpoint.random.randrange(1, 4)
            tensors[f"{layer}.A"] = tensors[f"{layer}.A"][:rank]
            tensors[f"{layer}.B"] = tensors[f"{layer}.B"][:, :rank]
        else:
            tensors.popitem()

    checkpoint.rewrite(checkpoint.file(), change)


def swap_tensors(checkpoint: Checkpoint) -> None:
    def change(tensors: dict) -> None:
        first = checkpoint.random.choice(sorted(tensors))
        alike = [name for name, t in tensors.items() if name != first and t.shape == tensors[first].shape and t.numel()]
        if alike:
            second = checkpoint.random.choice(sorted(alike))
            tensors[first], tensors[second] = tensors[second], tensors[first]
        else:
            del tensors[first]

    checkpoint.rewrite(checkpoint.file(), change)


def add_a_tensor(checkpoint: Checkpoint) -> None:
    names = [
        "extra",
        "model.layers.0.mlp.up_proj.mask",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.values",
        "model.layers.0.self_attn.k_proj.A",
        "model.layers.9.mlp.up_proj.weight",
        "model.embed_tokens.mask",
    ]

    def change(tensors: dict) -> None:
        tensors[checkpoint.random.choice(names)] = torch.ones(checkpoint.random.choice(((0,), (4,), (4, 32))))

    checkpoint.rewrite(checkpoint.file(), change)


def rename_a_tensor(checkpoint: Checkpoint) -> None:
    def change(tensors: dict) -> None:
        name = checkpoint.random.choice(sorted(tensors))
        at = checkpoint.random.randrange(len(name))
        tensors[name[:at] + "x" + name[at + 1 :]] = tensors.pop(name)

    checkpoint.rewrite(checkpoint.file(), change)


def mix_with_the_other(checkpoint: Checkpoint) -> None:
    """Some files of another save, as after a copy that was interrupted."""
    names = sorted(path.name for path in checkpoint.other.iterdir() if path.suffix != ".md")
    for name in checkpoint.random.sample(names, checkpoint.random.randrange(1, len(names))):
        shutil.copy(checkpoint.other / name, checkpoint.folder / name)


def leave_a_stale_file(checkpoint: Checkpoint) -> None:
    """A whole file of another save beside shards, which transformers prefers; or a copy under another name."""
    file = checkpoint.random.choice(sorted(checkpoint.other.glob("*.safetensors")))
    name = checkpoint.random.choice(("model.safetensors", "model-00001-of-00009.safetensors", file.name))
    shutil.copy(file, checkpoint.folder / name)


def lose_a_file(checkpoint: Checkpoint) -> None:
    checkpoint.random.choice([*checkpoint.folder.glob("*.safetensors"), *checkpoint.folder.glob(INDEX)]).unlink()


def edit_the_index(checkpoint: Checkpoint) -> None:
    if not (checkpoint.folder / INDEX).exists():
        return flip_header(checkpoint)

    def change(index: dict) -> None:
        names, files = sorted(index["weight_map"]), sorted(set(index["weight_map"].values()))
        lost = checkpoint.random.choice(files)
        ways = [
            lambda: index["weight_map"].pop(checkpoint.random.choice(names)),
            lambda: index["weight_map"].update({checkpoint.random.choice(names): checkpoint.random.choice(files)}),
            lambda: index["weight_map"].update({checkpoint.random.choice(names): "nowhere.safetensors"}),
            lambda: [index["weight_map"].pop(n) for n in names if index["weight_map"][n] == lost],
        ]
        checkpoint.random.choice(ways)()

    checkpoint.edit(INDEX, change)


def edit_the_settings(checkpoint: Checkpoint) -> None:
    """The quantization_config of config.json: wrong values and types, fields lost and added."""

    def change(config: dict) -> None:
        settings = config["quantization_config"]
        values = [None, 0, 1, -1, 3, 1e9, "1:4", "2:4", "x", [], {}, True, 0.5, "custom", "other", 10**40]
        name = checkpoint.random.choice(sorted(settings))
        ways = [
            lambda: settings.update({name: checkpoint.random.choice(values)}),
            lambda: settings.update({name: checkpoint.random.choice(values)}),
            lambda: settings.pop(name),
            lambda: settings.update(note_of_later=1),
        ]
        checkpoint.random.choice(ways)()

    checkpoint.edit("config.json", change)


def break_the_report(checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / REPORT
    text = path.read_text()
    content = json.loads(text)
    ways = [
        lambda: text[: checkpoint.random.randrange(len(text))],
        lambda: checkpoint.random.choice(("", "[]", "null", "NaN", "[" * 5000, "\x00", '{"layers": 3}', "1e999")),
        lambda: json.dumps({**content, "note_of_later": 1}),
        lambda: json.dumps(
            {
                **content,
                checkpoint.random.choice(sorted(content)): checkpoint.random.choice((3, "x", [1], {"a": []})),
            }
        ),
        lambda: json.dumps(
            {**content, "layers": [{}, {"name": "|`<b>\n#"}, {"shape": 3, "rank": [], "sparsity": "x"}]}
        ),
        lambda: json.dumps({**content, "base_model": "../../etc/passwd", "sizes": {"dense": 0, "packed": -1}}),
    ]
    path.write_text(checkpoint.random.choice(ways)())


# of files whose content is weights, names, or the report: the last must never stop a load
DAMAGE = (
    flip_payload,
    flip_payload,
    flip_header,
    truncate,
    lengthen,
    zero_a_page,
    drop_tensors,
    change_a_tensor,
    change_a_tensor,
    narrow_the_factors,
    swap_tensors,
    add_a_tensor,
    rename_a_tensor,
    mix_with_the_other,
    leave_a_stale_file,
    lose_a_file,
    edit_the_index,
    edit_the_settings,
    break_the_report,
)
