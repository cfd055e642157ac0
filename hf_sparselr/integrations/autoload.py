"""Register the plugin with transformers and PEFT at the moment they are imported.

Neither has an entry point for plugins, and a compressed checkpoint cannot be loaded without its quantizer. So
`import torch` runs an entry point of ours (see `entry_point`), which puts a finder on `sys.meta_path`. The finder lets
the import system tell us when a host has been imported. Until then only quick parts of the standard library are
loaded: `import torch` must neither get slower nor breakable.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Our module that registers classes with a host.
_REGISTERING = {
    "transformers.quantizers": "hf_sparselr.integrations.transformers.quantizer",
    "torch._export.serde.serialize": "hf_sparselr.kernels.ops",  # torch.export.load looks for our operators
}
# With the keys of `patches.PATCHES`, which is imported only when a host has been.
HOSTS = frozenset({*_REGISTERING, "transformers.modeling_utils", "transformers.trainer_utils", "peft"})


def watch() -> None:
    """Registers with each host as soon as its import ends; hosts that are imported already are left alone."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for host in HOSTS:
        # transformers.quantizers imports torch, and so the entry point, in the middle of its own import.
        spec = getattr(sys.modules.get(host), "__spec__", None)
        if getattr(spec, "_initializing", False):
            spec.__class__ = _WatchedSpec


def install() -> None:
    """Registers with the hosts that are imported, and with the others once they are."""
    watch()
    for host in HOSTS:
        spec = getattr(sys.modules.get(host), "__spec__", None)
        if spec is not None and not getattr(spec, "_initializing", False):
            _register(host)


def _register(host: str) -> None:
    try:
        if host in _REGISTERING:
            importlib.import_module(_REGISTERING[host])
        patches = importlib.import_module(f"{__package__}.patches")
        patches.apply_all(host)
    except Exception as error:  # the host must work even where our side does not
        import logging

        logger = logging.getLogger("hf_sparselr")
        logger.warning("hf_sparselr could not register itself with %s: %r", host, error)


class _WatchedSpec(ModuleSpec):
    """The spec of a host. The import system sets `_initializing` to False when the module has been executed."""

    @property
    def _initializing(self) -> bool:
        return bool(vars(self).get("_initializing", False))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        # Other threads wait until this is False.
        if not value and self._initializing and self._is_imported():
            _register(self.name)
        vars(self)["_initializing"] = value

    def _is_imported(self) -> bool:
        """False where the module raised."""
        return getattr(sys.modules.get(self.name), "__spec__", None) is self


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._searching or fullname not in HOSTS:
            return None
        self._searching = True  # find_spec below asks every finder, this one too
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if type(spec) is ModuleSpec:
            spec.__class__ = _WatchedSpec
        return spec


def autoload() -> None:
    """The function that `import torch` runs, through `hf_sparselr_autoload`."""
    watch()
