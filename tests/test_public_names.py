"""The public names, and that examples use nothing else."""

import ast

import datasets
import pytest
from helpers.paths import ROOT

import hf_sparselr
from hf_sparselr import load_texts


def test_every_public_name_exists():
    for name in hf_sparselr.__all__:
        assert callable(getattr(hf_sparselr, name)) or isinstance(getattr(hf_sparselr, name), str)
        assert name in dir(hf_sparselr)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_public_names_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in modules if name.startswith("hf_sparselr.")]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_sparselr"
    }
    assert used <= set(hf_sparselr.__all__)


def test_load_texts(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    assert load_texts(f"file:{tmp_path}/*.txt") == ["first", "second"]
    with pytest.raises(ValueError, match=r"source='file:.*none' matches no file"):
        load_texts(f"file:{tmp_path}/*.none")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or rows)
    assert load_texts("org/name:part", "validation") == ["one", "two"]
    assert asked == [(("org/name", "part"), {"split": "validation"})]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: rows.rename_column("text", "body"))
    with pytest.raises(ValueError, match=r"source='org/name' has columns \['body'\]: expected one named text"):
        load_texts("org/name")
