"""Starts hf_sparselr when torch is imported; does nothing where that package is gone. Never raises."""

import logging


def autoload() -> None:
    """The `torch.backends` entry point. An exception here would make `import torch` raise."""
    try:
        from hf_sparselr.integrations.autoload import autoload as start

        start()
    except Exception as error:
        gone = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == "hf_sparselr"
        if not gone:
            logging.getLogger("hf_sparselr").warning("hf_sparselr could not be started: %r", error)
