"""Sparse plus low-rank compression of transformers, as a transformers and PEFT plugin.

Importing this package loads only the standard library; public names are resolved on first use.
"""

import importlib

from .integrations import autoload as _autoload

TYPE_CHECKING = False  # a type checker takes it for true; typing itself need not be imported
if TYPE_CHECKING:
    from .compression.report import plot as plot_report  # noqa: F401
    from .compression.report import table as format_table  # noqa: F401
    from .config.sparselr_config import SparseLRConfig as SparseLRConfig
    from .data.sources import load_texts as load_texts
    from .entrypoints.compress import compress as compress
    from .entrypoints.export import export_portable as export_portable
    from .entrypoints.inspect import inspect_checkpoint as inspect_checkpoint
    from .entrypoints.perplexity import perplexity as perplexity
    from .entrypoints.refine import refine as refine
    from .entrypoints.train_mode import train_mode as train_mode
    from .integrations.peft.lora_config import as_peft_model as as_peft_model
    from .integrations.peft.lora_config import lora_config as lora_config
    from .integrations.peft.merging import merge_and_unload as merge_and_unload
    from .nn.linear import SparseLRLinear as SparseLRLinear
    from .utils.precision import multiplies_natively as multiplies_natively

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
    "multiplies_natively": "utils.precision:multiplies_natively",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)


_autoload.install()
