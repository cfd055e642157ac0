"""The vLLM plugin: `vllm serve DIR` of a compressed checkpoint. See README.md here."""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """The `vllm.general_plugins` entry point: vLLM calls it once in each of its processes, maybe more than once.

    Never raises: that would keep vLLM from serving other models. Where this vLLM is not the one we know, it then
    refuses our checkpoints as of an unknown quantization method.
    """
    try:
        from . import quantization  # noqa: F401 (importing it registers)
    except Exception as error:
        logger.warning("hf_sparselr could not register itself with vLLM, which cannot serve its checkpoints: %r", error)
