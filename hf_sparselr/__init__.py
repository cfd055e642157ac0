"""Sparse plus low-rank compression of transformers, as a transformers and PEFT plugin.

Importing this package loads only the standard library; public names are resolved on first use.
"""

import importlib

from .integrations import autoload as _autoload

__version__ = "0.1.0"

_PUBLIC = {
    "SparseLRConfig": "config",
    "SparseLRLinear": "modules",
    "compress": "offline",
    "refine": "outside",
    "lora_config": "integrations.peft",
    "as_peft_model": "integrations.peft",
    "merge_and_unload": "integrations.merging",
    "export_portable": "export",
    "perplexity": "evaluate",
    "train_mode": "training",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_autoload.install()
