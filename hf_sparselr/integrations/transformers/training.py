"""A check that runs before transformers' Trainer starts."""

from typing import Any

from ...config.sparselr_config import SparseLRConfig


def check_trainable(model: Any) -> None:
    """Before `validate_quantization_for_training`, whose error names only adapters.

    Raises:
        ValueError: a compressed model without adapters that `train_mode` has not prepared.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not isinstance(getattr(quantizer, "quantization_config", None), SparseLRConfig):
        return
    has_adapters = getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")
    if not has_adapters and not quantizer.is_qat_trainable:
        raise ValueError(
            "nothing of the compressed model is set to train. Choose one: hf_sparselr.train_mode(model) trains its "
            "low-rank factors (or more) without adapters; peft.get_peft_model(model, hf_sparselr.lora_config(model)) "
            "trains them as a LoRA adapter; peft.LoraConfig trains a new adapter beside them"
        )
