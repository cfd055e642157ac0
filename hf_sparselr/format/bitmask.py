"""The packed form of a sparse matrix: a bitmask and the kept values."""

import torch


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """bool (out, in) -> uint8 (out, ceil(in / 8)), least significant bit first."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).to(torch.uint8)
    return (padded.unflatten(1, (-1, 8)) << _shifts(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """uint8 (out, ceil(in / 8)) -> bool (out, in)."""
    bits = (packed.unsqueeze(-1) >> _shifts(packed.device)) & 1
    return bits.flatten(1)[:, :in_features].bool()


def pack(dense: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed mask, values) of a matrix (out, in) and its support, which may hold zeros."""
    return pack_mask(mask), dense[mask]


def unpack(packed: torch.Tensor, values: torch.Tensor, in_features: int) -> torch.Tensor:
    """The dense matrix (out, in), in the dtype of the values."""
    mask = unpack_mask(packed, in_features)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
