"""How much memory a model, and its distillation, take."""

import logging

import torch
from transformers import PreTrainedModel

from ..compression.activations import work_device
from ..config.sparselr_config import SparseLRConfig
from ..utils.modules import tensor_bytes

TRAINED = 24  # bytes a weight: FP32 teacher, master, gradient, two moments, the state at the start

logger = logging.getLogger("hf_sparselr")


def distillation_bytes(model: PreTrainedModel, config: SparseLRConfig) -> int:
    """Bytes that distillation holds on its device, without activations, about."""
    if config.distill.train == "factors":
        return 2 * tensor_bytes(model)
    return TRAINED * sum(parameter.numel() for parameter in model.parameters())


def tell_distillation_memory(model: PreTrainedModel, config: SparseLRConfig) -> None:
    """Logs what distillation needs; a warning where the GPU has less."""
    if "distill" not in config.refine_steps:
        return
    needed, device = distillation_bytes(model, config), work_device(config.device, model.device)
    told = f"distillation holds about {needed / 1e9:.1f} GB on {device}, beside the activations"
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if total is None or needed < total:
        logger.info(told)
        return
    advice = 'use distill={"train": "factors"}' if config.distill.train == "all" else "leave distillation out"
    logger.warning(f"{told}, which has {total / 1e9:.1f} GB: {advice}, or a larger GPU")
