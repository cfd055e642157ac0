"""Register the plugin with transformers and PEFT at the moment they are imported.

transformers and PEFT have no plugin entry points, and a compressed checkpoint opened without its quantizer
cannot be loaded. `import torch` runs the `torch.backends` entry point below, which only puts a finder on
`sys.meta_path`; the finder imports our glue right after the host package has been executed. This module
imports nothing but the standard library: `import torch` must neither get slower nor breakable.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

# host module -> our module that is imported once the host has been executed
_GLUE = {
    "transformers.quantizers": "hf_sparselr.integrations.transformers.quantizer",
    "peft": "hf_sparselr.integrations.peft.guards",
}


class _AfterExec(importlib.abc.Loader):
    """Wraps a module's own loader and imports the glue after it."""

    def __init__(self, loader, glue: str) -> None:
        self._loader = loader
        self._glue = glue

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            importlib.import_module(self._glue)
        except Exception as error:  # the host must work even where our glue does not
            warnings.warn(
                f"hf_sparselr could not register itself with {module.__name__}: {error!r}", stacklevel=2
            )


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, fullname, path=None, target=None):
        if self._searching or fullname not in _GLUE:
            return None
        self._searching = True  # find_spec below asks every finder, this one too
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterExec(spec.loader, _GLUE[fullname])
        return spec


def _watch() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def install() -> None:
    """Register with the hosts that are already imported and watch for those that are not."""
    _watch()
    for host, glue in _GLUE.items():
        module = sys.modules.get(host)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            importlib.import_module(glue)


def autoload() -> None:
    """The `torch.backends` entry point. Never raises: that would break `import torch`."""
    try:
        _watch()
    except Exception as error:
        warnings.warn(f"hf_sparselr autoload failed: {error!r}", stacklevel=2)
