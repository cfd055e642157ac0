"""S in the order of tiles, against a loop over its entries."""

import pytest
import torch

from hf_sparselr.format.bitmask import pack
from hf_sparselr.kernels import tile_order
from hf_sparselr.kernels.tile_order import fits_tiles, from_tiles, packed_from_tiles, packed_to_tiles, to_tiles

SHAPES = [(16, 64), (48, 192), (32, 128)]


def place(row: int, column: int, ins: int) -> int:
    """Of an entry of S among the entries of S'."""
    tile = (row // 16 * (ins // 8) + column // 8) * 2 + row % 16 // 8
    return 64 * tile + row % 8 * 8 + column % 8


@pytest.mark.parametrize(("outs", "ins"), SHAPES)
def test_each_entry_has_its_place(outs: int, ins: int) -> None:
    S = torch.arange(outs * ins).reshape(outs, ins)
    tiles = to_tiles(S).flatten()
    assert all(tiles[place(row, column, ins)] == S[row, column] for row in range(outs) for column in range(ins))
    assert torch.equal(from_tiles(to_tiles(S)), S)


@pytest.mark.parametrize(("outs", "ins"), SHAPES)
@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_packed_forms(outs: int, ins: int, density: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_order, "_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(outs)
    bits = torch.randint(-(2**15), 2**15, (outs, ins), dtype=torch.int16, generator=generator)
    S, support = bits.view(torch.bfloat16), torch.rand(outs, ins, generator=generator) < density  # NaN and -0 too
    mask, values = pack(S, support)
    tiled_mask, tiled_values = packed_to_tiles(mask, values, ins)
    expected_mask, expected_values = pack(to_tiles(S), to_tiles(support))
    assert torch.equal(tiled_mask, expected_mask)
    assert torch.equal(tiled_values.view(torch.int16), expected_values.view(torch.int16))
    back_mask, back_values = packed_from_tiles(tiled_mask, tiled_values, ins)
    assert torch.equal(back_mask, mask)
    assert torch.equal(back_values.view(torch.int16), values.view(torch.int16))


def test_shapes_without_whole_tiles() -> None:
    assert fits_tiles(1536, 576) and not fits_tiles(1544, 576) and not fits_tiles(1536, 584)
    with pytest.raises(ValueError, match="8 x 64"):
        packed_to_tiles(*pack(torch.ones(8, 64), torch.ones(8, 64, dtype=torch.bool)), 64)
