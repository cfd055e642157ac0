"""Which optional libraries are installed."""

import importlib.util

TRITON = importlib.util.find_spec("triton") is not None  # not a function: torch.compile would trace into it
