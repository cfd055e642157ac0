"""The order in which S lies on a GPU for `cuda/tiles.cu`: tiles of 8 x 8 entries, one after the other.

Strips of 16 rows follow one another; in a strip, columns by eight; of these, the upper eight rows before the lower
eight. So four tiles are what a warp's tensor cores take of 16 x 16 entries, and a word of 64 bits of the mask is a
tile, of which bits 2 l and 2 l + 1 are lane l's. The matrix S' of the same shape whose rows, one after the other, hold
the entries in this order is packed as any matrix is (`format.bitmask`). Sixteen rows of S' hold the same entries as
those of S.
"""

from collections.abc import Callable

import torch

from ..format.bitmask import pack, unpack, unpack_mask

STRIP = 16  # rows
_WORD = 64  # columns, of which a row of S' needs whole words
_AT_ONCE = 2**24  # entries that are unpacked together


def fits_tiles(out_features: int, in_features: int) -> bool:
    """Whether a matrix of this shape consists of whole tiles."""
    return out_features % STRIP == 0 and in_features % _WORD == 0


def to_tiles(rows: torch.Tensor) -> torch.Tensor:
    """S (out, in) -> S' (out, in), of any dtype; a shape that `fits_tiles`."""
    outs, ins = rows.shape
    return rows.reshape(outs // STRIP, 2, 8, ins // 8, 8).permute(0, 3, 1, 2, 4).reshape(outs, ins)


def from_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """S' (out, in) -> S (out, in)."""
    outs, ins = tiles.shape
    return tiles.reshape(outs // STRIP, ins // 8, 2, 8, 8).permute(0, 2, 3, 1, 4).reshape(outs, ins)


def packed_to_tiles(mask: torch.Tensor, values: torch.Tensor, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, values) of S -> those of S', as many bytes.

    Args:
        mask: uint8 (out, in / 8), where (out, in) `fits_tiles`.
        values: (nonzeros,).
    """
    return _repacked(mask, values, in_features, to_tiles)


def packed_from_tiles(mask: torch.Tensor, values: torch.Tensor, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, values) of S' -> those of S: undoes `packed_to_tiles` bit for bit."""
    return _repacked(mask, values, in_features, from_tiles)


def _repacked(
    mask: torch.Tensor, values: torch.Tensor, ins: int, reorder: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some strips at a time, whose values have the same place before and after."""
    if not fits_tiles(mask.shape[0], ins):
        raise ValueError(f"tiles need rows by {STRIP} and columns by {_WORD}, not {mask.shape[0]} x {ins}")
    new_mask, new_values, first = torch.empty_like(mask), torch.empty_like(values), 0
    rows = max(1, _AT_ONCE // (STRIP * ins)) * STRIP
    for part, new_part in zip(mask.split(rows), new_mask.split(rows), strict=True):
        support = unpack_mask(part, ins)
        kept = int(support.sum())
        dense = unpack(part, values[first : first + kept], ins)
        packed, new_values[first : first + kept] = pack(reorder(dense), reorder(support))
        new_part.copy_(packed)
        first += kept
    return new_mask, new_values
