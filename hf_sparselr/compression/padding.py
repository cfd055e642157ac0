"""Padding: positions that the calibration data mark as empty count neither in Gram matrices nor in losses."""

from typing import Any

import torch
from torch import nn

MASKS = ("attention_mask", "decoder_attention_mask")


def padding_masks(
    model: nn.Module, name: str, inputs: dict[str, Any], hidden: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """The masks (rows, length) for a block's inputs, True at real positions.

    The first one is that of the hidden states. A decoder that attends to an encoder's outputs also has their mask.
    Masks without padding are left out, as are masks of other lengths than the tensors have: a model that shortens its
    inputs makes masks of its own.

    Args:
        name: of the block in the model.
        inputs: of the model.
        hidden, kwargs: of the block.
    """
    tensors = [hidden, *(value for value in kwargs.values() if isinstance(value, torch.Tensor))]
    lengths = {tuple(tensor.shape[:2]) for tensor in tensors if tensor.ndim > 2}
    masks = [inputs[key] for key in MASKS if isinstance(inputs.get(key), torch.Tensor)]
    if _is_in_decoder(model, name):
        masks.reverse()
        if "decoder_attention_mask" not in inputs:
            lengths.discard(tuple(hidden.shape[:2]))  # its own positions are all real
    chosen: dict[tuple, torch.Tensor] = {}
    for mask in masks:
        if mask.ndim == 2 and tuple(mask.shape) in lengths:
            chosen.setdefault(tuple(mask.shape), mask.bool())
    return tuple(mask for mask in chosen.values() if not bool(mask.all()))


def _is_in_decoder(model: nn.Module, name: str) -> bool:
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    encoder = model.get_encoder()
    block = model.get_submodule(name)
    return encoder is None or not any(part is block for part in encoder.modules())


def real_rows(tensor: torch.Tensor, masks: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The rows (positions, features) of a tensor (rows, length, features), or (rows * length, features), that are real.

    A tensor that no mask fits comes back as it is.
    """
    for mask in masks:
        mask = mask.to(tensor.device)
        if tensor.ndim == 3 and tensor.shape[:2] == mask.shape:
            return tensor[mask]
        if tensor.ndim == 2 and len(tensor) == mask.numel():
            return tensor[mask.flatten()]
    return tensor


def position_mask(output: torch.Tensor, masks: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """The mask (rows, length) of a block's output (rows, length, ...); None where all its positions are real."""
    return next((mask for mask in masks if mask.shape == output.shape[:2]), None)
