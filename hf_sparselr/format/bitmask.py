"""The packed form of a sparse matrix: a bitmask and the kept values."""

import torch

from .patterns import NM

_BITS = torch.tensor([byte.bit_count() for byte in range(256)], device="cpu")


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
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)  # of the values: vmap maps both


def count_kept(packed: torch.Tensor, in_features: int, pattern: NM | None = None) -> tuple[int, bool]:
    """How many entries a packed mask keeps, and whether it obeys an N:M pattern.

    Where groups do not cross bytes, the frequencies of the 256 bytes tell both.

    Args:
        packed: uint8 (out, ceil(in / 8)), on the CPU, without bits beyond the inputs.
        pattern: its m divides `in_features`; None obeys anything.
    """
    frequencies = torch.bincount(packed.flatten(), minlength=256)
    kept = int((frequencies * _BITS).sum())
    if pattern is None:
        return kept, True
    if 8 % pattern.m == 0:
        every_byte = unpack_mask(torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None], 8)
        allowed = (every_byte.unflatten(1, (-1, pattern.m)).sum(-1) <= pattern.n).all(-1)
        return kept, not frequencies[~allowed].any()
    rows = max(1, 2**24 // in_features)  # unpacked at a time
    return kept, all(pattern.allows(unpack_mask(part, in_features)) for part in packed.split(rows))


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
