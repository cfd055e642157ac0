"""The cache of compiled C libraries: built once, rebuilt when damaged, never another user's."""

import ctypes
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.subprocesses import check

from hf_sparselr.utils import c_compiler

SOURCE = "int answer(void) { return %d; }\n"
WARNING = "no library (%s)"

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("cc") is None, reason="needs POSIX and a C compiler"
)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A cache in an empty folder; compilers are counted through `home/compiled`."""
    monkeypatch.setattr(c_compiler, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    wrapper = tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/compiled\nexec {shutil.which("cc")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    monkeypatch.setattr(c_compiler, "_HUNG", {})
    for cached in (c_compiler._process_folder, c_compiler._warn):
        cached.cache_clear()
    yield tmp_path
    c_compiler._process_folder.cache_clear()


def load(value: int) -> ctypes.CDLL | None:
    return c_compiler.load("sample", SOURCE % value, WARNING)


def compiled(home: Path) -> int:
    log = home / "compiled"
    return len(log.read_text().splitlines()) if log.exists() else 0


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/*.so"))


def test_compiles_once_into_a_folder_of_its_own(home):
    assert load(3).answer() == 3
    assert load(3).answer() == 3
    assert compiled(home) == 1
    (library,) = files(home)
    assert library.parent == home / "hf" / "hf_sparselr"
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert load(4).answer() == 4 and compiled(home) == 2


@pytest.mark.parametrize("content", [b"", b"not a library", None])
def test_a_damaged_library_is_rebuilt(home, content):
    path = c_compiler._library("sample", SOURCE % 5, c_compiler._FLAGS)
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2] if content is None else content)
    assert load(5).answer() == 5
    assert compiled(home) == 2 and len(files(home)) == 1


def test_a_library_of_another_content_is_not_loaded(home):
    """Another library under the right name, as a poisoned cache holds it."""
    wanted = c_compiler._library("sample", SOURCE % 6, c_compiler._FLAGS)
    other = c_compiler._library("sample", SOURCE % 7, c_compiler._FLAGS)
    wanted.write_bytes(other.read_bytes())
    assert load(6).answer() == 6


def test_a_link_is_not_followed(home):
    path = c_compiler._library("sample", SOURCE % 8, c_compiler._FLAGS)
    path.rename(home / "elsewhere.so")
    path.symlink_to(home / "elsewhere.so")
    assert load(8).answer() == 8 and compiled(home) == 2
    assert not any(file.is_symlink() for file in files(home / "hf"))


@pytest.mark.parametrize("mode", [0o777, 0o770])
@pytest.mark.parametrize("where", ["hf", "hf/hf_sparselr"])
def test_a_folder_that_others_can_write_is_left(home, where, mode):
    (home / "hf" / "hf_sparselr").mkdir(parents=True)
    (home / where).chmod(mode)
    assert load(9).answer() == 9
    assert files(home / "hf") == []
    assert files(home / "xdg" / "hf_sparselr") != []


def test_a_sticky_folder_above_is_fine(home):
    (home / "hf").mkdir()
    (home / "hf").chmod(0o1777)
    assert load(10).answer() == 10
    assert len(files(home / "hf" / "hf_sparselr")) == 1


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
@pytest.mark.parametrize("where", ["hf", "hf/hf_sparselr"])
def test_a_folder_of_another_user_is_left(home, where):
    path = c_compiler._library("sample", SOURCE % 11, c_compiler._FLAGS)
    os.chown(home / where, 12345, 12345)
    assert load(11).answer() == 11
    assert files(home / "hf") == [path] and files(home / "xdg" / "hf_sparselr") != []


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
def test_a_library_of_another_user_is_rebuilt(home):
    path = c_compiler._library("sample", SOURCE % 12, c_compiler._FLAGS)
    os.chown(path, 12345, 12345)
    assert load(12).answer() == 12
    assert compiled(home) == 2 and all(file.stat().st_uid == os.geteuid() for file in files(home))


def test_without_any_folder_the_library_lasts_for_the_process(home, monkeypatch):
    for blocked in ("hf", "xdg"):
        (home / blocked).write_text("a file, so no folder can be made here")
    temporary = home / "temporary"
    temporary.mkdir()
    code = f"""
from hf_sparselr.utils import c_compiler
c_compiler.HF_HOME = {str(home / "hf")!r}
assert c_compiler.load("sample", {SOURCE % 13!r}, "%s").answer() == 13
import pathlib
assert len(list(pathlib.Path({str(temporary)!r}).glob("hf_sparselr-*/*.so"))) == 1
"""
    monkeypatch.setenv("TMPDIR", str(temporary))
    check(code, ROOT, cwd=home)
    assert list(temporary.iterdir()) == []


def test_arguments_of_cc_reach_the_compiler(home, monkeypatch):
    source = "int answer(void) { return ANSWER; }\n"
    assert c_compiler.load("sample", source, WARNING) is None
    monkeypatch.setenv("CC", f"{os.environ['CC']} -DANSWER=14")
    assert c_compiler.load("sample", source, WARNING).answer() == 14
    monkeypatch.setenv("CC", f"{os.environ['CC'].split()[0]} '-DANSWER=(7 + 8)'")
    assert c_compiler.load("sample", source, WARNING).answer() == 15


def test_the_reason_is_told(home, monkeypatch, caplog):
    assert c_compiler.load("sample", "int answer(void) { return absent; }", WARNING) is None
    assert "no library (" in caplog.text and "absent" in caplog.text
    monkeypatch.setenv("CC", str(home / "no-compiler"))
    assert load(16) is None and "no-compiler" in caplog.text


def test_the_same_reason_is_told_once(home, monkeypatch, caplog):
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(home))
    assert load(18) is None and load(19) is None
    assert [record.getMessage() for record in caplog.records] == ["no library (no C compiler found)"]
    assert c_compiler.load("sample", SOURCE % 18, "slow (%s)") is None
    assert caplog.records[-1].getMessage() == "slow (no C compiler found)"


def test_a_compiler_that_hangs_is_given_up(home, monkeypatch, caplog):
    slow = home / "slow"
    slow.write_text(f"#!/bin/sh\necho >> {home}/compiled\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(c_compiler, "COMPILE_SECONDS", 0.2)
    assert load(17) is None and "timed out" in caplog.text
    assert load(18) is None and compiled(home) == 1 and len(caplog.records) == 1
    assert files(home) == [] and not list((home / "hf" / "hf_sparselr").iterdir())
