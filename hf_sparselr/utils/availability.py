"""Which optional libraries are installed."""

import importlib.util

TRITON = (
    importlib.util.find_spec("triton") is not None
)  # a constant: torch.compile would trace into a function
