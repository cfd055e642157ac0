"""The SGLang plugin. See README.md here: it has not run in SGLang itself."""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """The `sglang.srt.plugins` entry point: SGLang calls it in each of its processes. Never raises, as for vLLM."""
    try:
        from . import quantization  # noqa: F401 (importing it registers)
    except Exception as error:
        logger.warning(
            "hf_sparselr could not register itself with SGLang, which cannot serve its checkpoints: %r", error
        )
