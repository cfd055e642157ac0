"""Sparse plus low-rank compression of transformers, as a transformers and PEFT plugin.

Importing this package loads only the standard library; public names are resolved on first use.
"""

import importlib

from .integrations import autoload as _autoload

__version__ = "0.1.0"

_PUBLIC = {
    "SparseLRConfig": "config.sparselr_config",
    "SparseLRLinear": "nn.linear",
    "compress": "entrypoints.compress",
    "refine": "entrypoints.refine",
    "lora_config": "integrations.peft.lora_config",
    "as_peft_model": "integrations.peft.lora_config",
    "merge_and_unload": "integrations.peft.merging",
    "export_portable": "entrypoints.export",
    "perplexity": "entrypoints.perplexity",
    "train_mode": "entrypoints.train_mode",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_autoload.install()
