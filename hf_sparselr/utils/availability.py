"""Which optional libraries are installed."""

import importlib.util

# A constant, because torch.compile would trace into a function.
TRITON = importlib.util.find_spec("triton") is not None
