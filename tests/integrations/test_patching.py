"""Wrapping functions of other libraries, on a small library made for the purpose and on the real hosts."""

import importlib
import inspect
import sys

import pytest

from hf_sparselr.integrations.autoload import HOSTS
from hf_sparselr.integrations.patches import PATCHES
from hf_sparselr.integrations.patching import Patch, apply

HOST = '''
def scale(x, by=2, **extra):
    """Doc of scale."""
    return x * by

class Tool:
    def use(self, times=1):
        return times

    @classmethod
    def make(cls, x=1):
        return cls, x
'''
OURS = """
calls = []

def check(x, by, unit="m"):
    if x < 0:
        raise ValueError("x is negative")
    calls.append((x, by, unit))

def refuse(x):
    if x < 0:
        raise ValueError("x is negative")

def around(call, self, times):
    return [call(), times]

def needs(times, gone):
    raise AssertionError("never called")
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A package with a function that its root imports by name, and our side of the patches."""
    (tmp_path / "toolbox").mkdir()
    (tmp_path / "toolbox" / "__init__.py").write_text("from .inner import Tool, scale\n")
    (tmp_path / "toolbox" / "inner.py").write_text(HOST)
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("toolbox")
    ours = type(sys)("hf_sparselr.integrations.ours_of_toolbox")
    exec(OURS, vars(ours))
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    package.ours = ours
    yield package
    for name in ("toolbox", "toolbox.inner"):
        del sys.modules[name]


def patch(target, ours, **more):
    return Patch(target, f"ours_of_toolbox:{ours}", lost="the check is lost", **more)


def test_a_check_sees_the_arguments_by_name_with_defaults(host):
    assert apply(patch("toolbox.inner:scale", "check"))
    assert host.scale(3) == 6 and host.scale(by=5, x=1, unit="km") == 5
    assert host.ours.calls == [(3, 2, "m"), (1, 5, "km")]
    with pytest.raises(ValueError, match="x is negative"):
        host.scale(-1)


@pytest.mark.parametrize("pass_on", [lambda f, *a: f(*a), lambda f, *a: f(**dict(zip(("x", "by"), a, strict=True)))])
def test_what_runs_around_a_function_may_change_its_arguments(host, pass_on):
    host.ours.change = lambda call, x, extra: call(x=x + 1, note=extra)
    apply(patch("toolbox.inner:scale", "change", around=True))
    assert pass_on(host.scale, 3, 5) == 4 * 5
    with pytest.raises(TypeError, match="other"):
        host.ours.use_other = lambda call, times: call(other=times)
        apply(patch("toolbox.inner:Tool.use", "use_other", around=True))
        host.Tool().use()


def test_what_imported_a_function_by_name_is_wrapped_too(host):
    assert apply(patch("toolbox.inner:scale", "check"))
    assert host.scale is host.inner.scale
    with pytest.raises(ValueError, match="negative"):
        host.scale(-1)


def test_a_wrapped_function_looks_like_itself(host):
    plain = host.inner.scale
    apply(patch("toolbox.inner:scale", "check"))
    wrapped = host.inner.scale
    assert wrapped.__wrapped__ is plain and wrapped.__doc__ == plain.__doc__ and wrapped.__name__ == "scale"
    assert inspect.signature(wrapped) == inspect.signature(plain)


def test_wrong_arguments_raise_the_hosts_own_error(host):
    with pytest.raises(TypeError) as plain:
        host.scale()
    apply(patch("toolbox.inner:scale", "check"))
    with pytest.raises(TypeError) as wrapped:
        host.scale()
    assert str(wrapped.value) == str(plain.value)


def test_a_method_is_wrapped_around(host):
    assert apply(patch("toolbox.inner:Tool.use", "around", around=True))
    assert host.Tool().use() == [1, 1] and host.Tool().use(times=4) == [4, 4]


def test_a_classmethod_is_called_as_before(host):
    assert apply(patch("toolbox.inner:Tool.make", "refuse"))
    for owner in (host.Tool, host.Tool()):
        assert owner.make(3) == (host.Tool, 3)
    with pytest.raises(ValueError, match="negative"):
        host.Tool.make(x=-1)


def test_wrapping_twice_changes_nothing(host):
    first = patch("toolbox.inner:Tool.use", "around", around=True)
    assert apply(first) and apply(first)
    assert host.Tool().use() == [1, 1]
    between = host.Tool.use

    def foreign(self, times=1):
        return between(self, times)

    foreign.__wrapped__ = between  # as functools.wraps of another library leaves it
    host.Tool.use = foreign
    assert apply(first) and host.Tool.use is foreign


@pytest.mark.parametrize("target", ["toolbox.gone:f", "toolbox.inner:gone", "toolbox.inner:Tool.gone"])
def test_a_target_that_is_gone_is_said_and_stops_nothing(host, caplog, target):
    assert not apply(patch(target, "check"))
    assert [record.getMessage() for record in caplog.records if target in record.getMessage()]
    assert "the check is lost" in caplog.text
    assert host.scale(3) == 6


@pytest.mark.parametrize(
    "ours", ["ours_of_toolbox:needs", "no_such_module:check"], ids=["an argument", "a module of ours"]
)
def test_what_our_side_lacks_is_said_once(host, caplog, ours):
    apply(Patch("toolbox.inner:Tool.use", ours, lost="the check is lost"))
    assert [host.Tool().use(3) for _ in range(3)] == [3, 3, 3]
    assert caplog.text.count("the check is lost") == 1


@pytest.mark.parametrize(
    "listed", [patch for patches in PATCHES.values() for patch in patches], ids=lambda patch: patch.target
)
def test_the_installed_hosts_have_every_target(listed, caplog):
    """And the arguments that our side takes."""
    assert apply(listed), caplog.text
    module, _, path = listed.target.partition(":")
    function = importlib.import_module(module)
    for name in path.split("."):
        function = getattr(function, name)
    room, _, name = listed.ours.partition(":")
    ours = getattr(importlib.import_module(f"hf_sparselr.integrations.{room}"), name)
    declared = list(inspect.signature(ours).parameters)[listed.around :]
    assert set(declared) <= set(inspect.signature(function).parameters)
    assert listed.lost


def test_every_patch_belongs_to_a_host_that_is_watched():
    assert set(PATCHES) <= HOSTS
