"""Sparse plus low-rank compression of transformers, as a transformers and PEFT plugin.

Importing this package loads only the standard library; public names are resolved on first use.
"""

import importlib

from .integrations import autoload as _autoload

__version__ = "0.1.0"

# public name: "module:name there"
_PUBLIC = {
    "SparseLRConfig": "config.sparselr_config:SparseLRConfig",
    "SparseLRLinear": "nn.linear:SparseLRLinear",
    "compress": "entrypoints.compress:compress",
    "refine": "entrypoints.refine:refine",
    "lora_config": "integrations.peft.lora_config:lora_config",
    "as_peft_model": "integrations.peft.lora_config:as_peft_model",
    "merge_and_unload": "integrations.peft.merging:merge_and_unload",
    "export_portable": "entrypoints.export:export_portable",
    "inspect_checkpoint": "entrypoints.inspect:inspect_checkpoint",
    "perplexity": "entrypoints.perplexity:perplexity",
    "train_mode": "entrypoints.train_mode:train_mode",
    "load_texts": "data.sources:load_texts",
    "plot_report": "compression.report:plot",
    "format_table": "compression.report:table",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)


_autoload.install()
