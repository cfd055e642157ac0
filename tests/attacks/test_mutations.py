"""Damaged checkpoints: each is refused with a reason, or gives the model that was saved, or `--verify` finds it.

The numbers of the whole attack (marker slow) are in hf_sparselr/format/README.md.
"""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers import checkpoints, tiny
from helpers.checkpoints import DAMAGE, Checkpoint, break_the_report
from transformers import AutoModelForCausalLM

from hf_sparselr.entrypoints.inspect import inspect_checkpoint

# RuntimeError: transformers' own, for a dense tensor of another shape.
REASONS = (ValueError, TypeError, OSError, RuntimeError)


@pytest.fixture(scope="module")
def saves(tmp_path_factory) -> dict[str, list[Path]]:
    """By layout of the files: two saves of models with the same shapes."""
    folder = tmp_path_factory.mktemp("saves")
    models = [checkpoints.compressed(seed) for seed in (0, 1)]
    made = {}
    for layout, size in (("whole", "1GB"), ("shards", "40KB")):
        made[layout] = [folder / f"{layout}-{number}" for number in (0, 1)]
        for path, model in zip(made[layout], models, strict=True):
            model.save_pretrained(path, max_shard_size=size)
    return made


def outcome(folder: Path, whole: list[dict], must_load: bool) -> str:
    """ "refused", "same", "found" (loads, and `inspect --verify` refuses it), "silent" or "crash ...".

    Args:
        whole: the tensors of the save, and of the other one, which may have replaced it entirely.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except REASONS as error:
        return f"crash: no reason given by {type(error).__name__}" if must_load or not str(error) else "refused"
    except Exception as error:
        return f"crash: {error!r}"
    if any(tiny.same(tiny.snapshot(model), tensors) for tensors in whole):
        if must_load:
            model.save_pretrained(folder.with_name("again"))
        return "same"
    try:
        inspect_checkpoint(folder, verify=True)
    except (ValueError, OSError):
        return "found"
    return "silent"


def attack(saves: dict[str, list[Path]], tmp_path: Path, seeds: range) -> Counter:
    whole = [tiny.snapshot(AutoModelForCausalLM.from_pretrained(path)) for path in saves["whole"]]
    others = [folder for folders in saves.values() for folder in folders]
    counts, failures = Counter(), []
    for seed in seeds:
        chosen = random.Random(seed)
        layout, damage = chosen.choice(sorted(saves)), DAMAGE[seed % len(DAMAGE)]
        folder = tmp_path / str(seed)
        shutil.copytree(saves[layout][0], folder)
        other = chosen.choice([path for path in others if path != saves[layout][0]])
        damage(Checkpoint(folder, other, chosen))
        found = outcome(folder, whole, damage is break_the_report)
        counts[found.partition(":")[0]] += 1
        if found.startswith(("crash", "silent")):
            failures.append(f"seed {seed}, {damage.__name__}, {layout}: {found}")
        shutil.rmtree(folder)
    assert not failures, f"{dict(counts)}\n" + "\n".join(failures)
    return counts


def test_a_sample_of_damage_is_noticed(saves, tmp_path):
    counts = attack(saves, tmp_path, range(3 * len(DAMAGE)))
    assert counts["refused"] > counts["same"] > 0 and counts["found"] > 0


@pytest.mark.slow
def test_damage_is_noticed(saves, tmp_path):
    print(dict(attack(saves, tmp_path, range(1000, 4000))))
