"""What is installed beside the package, and what becomes of `import torch` when the package is gone."""

import base64
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT

MODULE = "hf_sparselr_autoload.py"
BUILD = """
import sys
sys.path.insert(0, "hf_sparselr/integrations/entry_point")
import build_backend
print(getattr(build_backend, sys.argv[1])(sys.argv[2]))
"""
RUN = """
import importlib.metadata, site, sys
site.addsitedir(sys.argv[1])  # as a site-packages folder, whose .pth files count
points = [point for point in importlib.metadata.entry_points(group="torch.backends") if "sparselr" in point.name]
assert points
for point in points:
    point.load()()
print(any("sparselr" in type(finder).__module__ for finder in sys.meta_path))
"""


def python(code, *arguments, cwd, options=()):
    command = [sys.executable, *options, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


def run_entry_point(where, cwd):
    """In an interpreter that sees only the standard library and one site-packages folder."""
    return python(RUN, where, cwd=cwd, options=("-I", "-S"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    pytest.importorskip("setuptools", "77")
    path = tmp_path_factory.mktemp("build") / "checkout"
    path.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, path)
    shutil.copytree(ROOT / "hf_sparselr", path / "hf_sparselr", ignore=shutil.ignore_patterns("__pycache__"))
    return path


def install(checkout, hook, where):
    """Builds a wheel and unpacks it, which is all that installing this one takes."""
    built = python(BUILD, hook, where.parent, cwd=checkout)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(where.parent / built.stdout.split()[-1]) as wheel:
        wheel.extractall(where)
        return wheel


@pytest.fixture(params=["build_wheel", "build_editable"])
def installed(request, checkout, tmp_path):
    """(site-packages folder, the folder of the package that it uses)."""
    where = tmp_path / "site"
    install(checkout, request.param, where)
    return where, (where if request.param == "build_wheel" else checkout) / "hf_sparselr"


def test_the_entry_point_runs_while_the_package_is_there_and_survives_when_it_is_gone(installed, tmp_path):
    where, package = installed
    result = run_entry_point(where, tmp_path)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "True", "")
    away = package.rename(tmp_path / "away")
    try:
        result = run_entry_point(where, tmp_path)
        assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "False", "")
    finally:
        away.rename(package)


def test_uninstalling_removes_all(installed):
    """The wheel's RECORD lists every file with its hash; what is listed is removed."""
    where, _ = installed
    record = next(where.glob("*.dist-info")) / "RECORD"
    rows = {line.split(",")[0]: line.split(",")[1] for line in record.read_text().splitlines()}
    files = {path.relative_to(where).as_posix() for path in where.rglob("*") if path.is_file()}
    assert files == set(rows) and MODULE in files
    digest = hashlib.sha256((where / MODULE).read_bytes()).digest()
    assert rows[MODULE] == "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def test_import_torch_works_without_the_package(checkout, tmp_path):
    where = tmp_path / "site"
    install(checkout, "build_wheel", where)
    shutil.rmtree(where / "hf_sparselr")
    code = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
assert "hf_sparselr_autoload" in sys.modules and torch.ones(1) == 1
"""
    packages = Path(torch.__file__).parents[1]  # without its .pth files, which may lead to a checkout
    result = python(code, where, packages, cwd=tmp_path, options=("-I", "-S"))
    assert result.returncode == 0, result.stderr


def test_a_broken_package_is_said_and_stops_nothing(checkout, tmp_path):
    where = tmp_path / "site"
    install(checkout, "build_wheel", where)
    (where / "hf_sparselr" / "integrations" / "autoload.py").write_text("raise RuntimeError('broken')\n")
    (where / "hf_sparselr" / "__init__.py").write_text("")
    result = run_entry_point(where, tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, "False")
    assert result.stderr.strip() == "hf_sparselr could not be started: RuntimeError('broken')"


def test_the_source_distribution_can_build_itself(checkout, tmp_path):
    built = python(BUILD, "build_sdist", tmp_path, cwd=checkout)
    assert built.returncode == 0, built.stderr
    shutil.unpack_archive(tmp_path / built.stdout.split()[-1], tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    (unpacked / "out").mkdir()
    install(unpacked, "build_wheel", unpacked / "out" / "site")
    assert (unpacked / "out" / "site" / MODULE).is_file()
