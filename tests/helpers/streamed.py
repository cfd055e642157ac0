"""Streamed runs of tiny models, and what they write."""

import json
from pathlib import Path

import torch

from hf_sparselr import compress

from . import tiny

TIMES = ("seconds", "phases")
SHARDS = "30KB"


def content(folder: Path) -> dict:
    """The files of a folder, the report without times."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files["sparselr_report.json"] = without_times(json.loads(files["sparselr_report.json"]))
    files.pop("run.jsonl", None)
    card = files["README.md"].splitlines()
    files["README.md"] = [line for line in card if not line.startswith(b"| Time")]
    return files


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def dense(family: str, folder: Path, **changes) -> str:
    """A checkpoint of a tiny model in bfloat16, in several files."""
    tiny.build(family, torch.bfloat16, **changes).save_pretrained(folder, max_shard_size="40KB")
    return str(folder)


def run(name: str, output: Path, stream: bool = True, **changes):
    return compress(name, tiny.settings(**changes), output, stream=stream, max_shard_size=SHARDS)
