"""The one way to wrap a function or method of another library.

Imports only the standard library. Our side of a patch is imported when the wrapped function is first called: a patch
can then be applied while its host is still being imported, and costs an import of the host nothing.
"""

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("hf_sparselr")

_MARK = "_sparselr_patch"
_ROOM = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Patch:
    """What runs at a function of another library (the host).

    Attributes:
        target: "module:function" or "module:Class.method" of the host. A classmethod stays bound to that class.
        ours: "module:function" below `hf_sparselr.integrations`. It gets those arguments of the host's call that it
            declares, by the host's names and with the host's defaults filled in.
        lost: the consequence if the host has no such target; logged once.
        around: False: `ours` runs before the host's function, and may raise. True: `ours` runs in its place, gets
            the host's call as its first argument, and returns the result. The call is a function whose keyword
            arguments change arguments of the host's call.
    """

    target: str
    ours: str
    lost: str
    around: bool = False


def apply(patch: Patch) -> bool:
    """Wraps the target of a patch, once. Whether it is wrapped now.

    Never raises: without its target the host works as it does without this package, and the loss is logged.
    """
    module_name, _, path = patch.target.partition(":")
    *parents, name = path.split(".")
    try:
        owner = functools.reduce(getattr, parents, importlib.import_module(module_name))
        call = getattr(owner, name)
        if _is_patched(call, patch):
            return True
        wrapped = _wrap(call, patch)
        bound = isinstance(inspect.getattr_static(owner, name), classmethod | staticmethod)
        setattr(owner, name, staticmethod(wrapped) if bound else wrapped)
    except Exception as error:
        _say_lost(patch, error)
        return False
    if not parents:
        _replace_copies(module_name.partition(".")[0], call, wrapped)
    return True


def _say_lost(patch: Patch, reason: object) -> None:
    logger.warning("hf_sparselr cannot wrap %s (%s): %s", patch.target, reason, patch.lost)


def _is_patched(call: Any, patch: Patch) -> bool:
    """Whether a function has the patch, also below another library's wrapper."""
    while call is not None:
        if getattr(call, "__dict__", {}).get(_MARK) == patch.target:
            return True
        call = getattr(call, "__wrapped__", None)
    return False


def _wrap(call: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @functools.cache
    def load() -> tuple[Callable[..., Any], frozenset[str]] | None:
        return _load(patch, signature)

    @functools.wraps(call)
    def patched(*args: Any, **kwargs: Any) -> Any:
        loaded = load()
        if loaded is None:
            return call(*args, **kwargs)
        try:
            given = _arguments(signature, args, kwargs)
        except TypeError:  # the host's own error is the better one
            return call(*args, **kwargs)
        ours, names = loaded
        chosen = {name: value for name, value in given.items() if name in names}
        if patch.around:
            return ours(functools.partial(_call, call, signature, args, kwargs), **chosen)
        ours(**chosen)
        return call(*args, **kwargs)

    setattr(patched, _MARK, patch.target)
    return patched


def _call(
    call: Callable[..., Any],
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    **changes: Any,
) -> Any:
    """Calls the host's function with some arguments changed, whether they were passed by position or by name."""
    bound = signature.bind(*args, **kwargs)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    for name, value in changes.items():
        if name in signature.parameters:
            bound.arguments[name] = value
        elif rest is not None:
            bound.arguments[rest] = {**bound.arguments.get(rest, {}), name: value}
        else:
            raise TypeError(f"{call.__name__}() has no argument {name!r}")
    return call(*bound.args, **bound.kwargs)


def _load(patch: Patch, host: inspect.Signature) -> tuple[Callable[..., Any], frozenset[str]] | None:
    """Our function and the names of the arguments it takes; None, logged, if the host lacks one of these."""
    module, _, name = patch.ours.partition(":")
    try:
        ours = getattr(importlib.import_module(f"{_ROOM}.{module}"), name)
    except ImportError as error:
        _say_lost(patch, error)
        return None
    declared = list(inspect.signature(ours).parameters.values())[patch.around :]
    for parameter in declared:
        if parameter.default is parameter.empty and parameter.name not in host.parameters:
            _say_lost(patch, f"it has no argument {parameter.name}")
            return None
    return ours, frozenset(parameter.name for parameter in declared)


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults and those that only `**kwargs` takes among them."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return {
        **bound.arguments,
        **{key: value for name in rest for key, value in bound.arguments[name].items()},
    }


def _replace_copies(package: str, call: Any, wrapped: Callable[..., Any]) -> None:
    """Replaces a function where modules of its package have imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != package or module is None:
            continue
        for key, value in list(vars(module).items()):
            if value is call:
                setattr(module, key, wrapped)
