"""A config passed to `from_pretrained` for a checkpoint that is compressed already."""

from collections.abc import Callable
from typing import Any

from ...config.sparselr_config import QUANT_METHOD, SparseLRConfig


def merge_configs(call: Callable[[], Any], quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """Around `AutoHfQuantizer.merge_quantization_configs`: the stored config, run by the kernel that was passed.

    transformers would warn that all but a few fields are ignored. Here a field that contradicts the checkpoint is an
    error instead.

    Raises:
        ValueError: a field was passed that differs from the stored one.
    """
    requested, stored = quantization_config_from_args, quantization_config
    if not isinstance(requested, SparseLRConfig):
        return call()
    if isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD:
        stored = SparseLRConfig.from_dict(stored)
    if not isinstance(stored, SparseLRConfig):
        return call()
    if differences := requested.differences(stored):
        shown = ", ".join(f"{k}={mine!r} (stored: {there!r})" for k, (mine, there) in differences.items())
        raise ValueError(
            f"the checkpoint is already compressed with other settings: {shown}; load it without "
            "quantization_config, or compress the original dense model"
        )
    stored.kernel = requested.kernel  # the kernel is a choice for running; it is not stored
    return stored
