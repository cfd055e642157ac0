"""The ways to compute a product, and which of them are worth trying where."""

from dataclasses import dataclass

import torch

DECODE, SPARSE = ("vector", "tiles"), ("sparse", "joined")  # forms
MAX_ROWS = 16  # of x that the first two take
MOST_BLOCK_ROWS = 256  # of x for which "blocks" is worth trying, as it unpacks S for each 128; more: SPARSE


@dataclass(frozen=True)
class Plan:
    """How to compute one product.

    Attributes:
        form: reads the packed S: "vector" multiplies one row of x in FP32 registers, "tiles" gives up to 16 rows of 16
            bits to the tensor cores, "blocks" more of them. Unpacks S first: "folded" multiplies by S + B A, "beside"
            by S, B and A. On the sparse tensor cores: "sparse" multiplies by S, B and A, "joined" by [S, B] and A.
        rows: output rows of a program, a power of two ("tiles": at least 16).
        warps: of a program.
        split: programs that share output rows, each with a part of the columns (not for "vector").
        ahead: read the mask of the next columns, of 2:4 also the values, before multiplying these ("tiles" only).
        algorithm: cuSPARSELt's number for one ("sparse" and "joined" only).
    """

    form: str
    rows: int = 0
    warps: int = 0
    split: int = 1
    ahead: bool = False
    algorithm: int = 0

    @property
    def order(self) -> tuple:
        """Of the terms of a sum: packed plans of one order give the same bits."""
        return self.form, self.warps, self.split

    def __str__(self) -> str:
        if not self.rows:
            return self.form + f" {self.algorithm}" * (self.form in SPARSE)
        more = f" / {self.split}" * (self.split > 1) + " ahead" * self.ahead
        return f"{self.form} {self.rows} rows {self.warps} warps{more}"


VECTOR = (Plan("vector", 4, 4), Plan("vector", 2, 4), Plan("vector", 8, 4))  # of one order
TILES = (
    Plan("tiles", 16, 8, split=2),
    Plan("tiles", 16, 4),
    Plan("tiles", 16, 8, ahead=True),
    Plan("tiles", 16, 8, split=2, ahead=True),
    Plan("tiles", 16, 4, split=4),
    Plan("tiles", 16, 4, split=4, ahead=True),
    Plan("tiles", 16, 2, split=4, ahead=True),
)
BLOCKS = tuple(Plan("blocks", 64, 4, split=split) for split in (1, 2, 4, 8))


def packed_plans(rows: int, dtype: torch.dtype) -> tuple[Plan, ...]:
    """What reads the packed S, for so many rows of x: the first is taken where nothing can be measured."""
    if dtype.itemsize != 2:
        return VECTOR
    return VECTOR if rows == 1 else TILES


def candidates(rows: int, dtype: torch.dtype, rank: int) -> tuple[Plan, ...]:
    """What is worth trying for so many rows of x."""
    if rows <= MAX_ROWS:
        return (*packed_plans(rows, dtype), Plan("folded"))
    blocks = BLOCKS if dtype.itemsize == 2 and rows <= MOST_BLOCK_ROWS else ()
    beside = (Plan("beside"),) if rank else ()
    return (*blocks, Plan("folded"), *beside)
