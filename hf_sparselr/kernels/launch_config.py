"""The ways to compute a product on a GPU: one table from the rows of x to the kernels that are tried there."""

from dataclasses import dataclass

from .packed_weight import PackedWeight

FEW_ROWS = 16  # of x that "gemv" and "small_batch" take
NATIVE_ROWS = 32  # of x that "mma" takes
MEDIUM_ROWS = 256  # of x for which "medium_batch" is worth trying, as it unpacks S for each 128
TILE_ROWS = 256  # for which "tiles" is
LARGE = 2**25  # entries of S, from which on "vector" and "bitmask" take fewer rows of x
WIDE = 2**22  # entries of S, from which on "wgmma" is faster than "mma" for some numbers of rows that both take
LARGE_INPUT = 2**24  # entries of x, from which on clusters of "wgmma" share them
VECTOR_ROWS = 4  # of x that "vector" takes
VECTOR_ENTRIES = 2**20  # of S from which on it was measured
BITMASK_ROWS = 256  # of x that "bitmask" is faster for
BITMASK_ENTRIES = 2**24  # of S, likewise
MOST_ROWS = 8192  # with more rows the same configuration is the fastest


@dataclass(frozen=True)
class LaunchConfig:
    """How to compute one product.

    Attributes:
        kernel: reads the packed S: "gemv" multiplies one row of x in FP32 registers, "small_batch" gives up to 16 rows
            of 16 bits to the tensor cores, "medium_batch" more of them; "mma" does as "small_batch", in CUDA C++, and
            "tiles" as "medium_batch", at 2:4. "wgmma" takes any number of rows at 2:4, in CUDA C++ for compute
            capability 9.0. "bitmask", there likewise, takes other supports,
            "vector" of these up to four rows of x. "unpack_then_gemm" unpacks S first.
        rows: output rows of a program, a power of two ("small_batch": at least 16); of a warp ("tiles"); 64 or
            128 ("wgmma" and "bitmask"); "vector" shares them out among programs.
        warps: of a program.
        split: programs that share output rows, each with a part of the columns (not for "gemv").
        ahead: "small_batch": read the mask of the next columns, of 2:4 also the values, before multiplying these. "mma"
            at 2:4: steps along the columns whose loads are issued together. "vector": pairs of rows of S under way.
        resident: blocks of a multiprocessor that registers are left for ("mma", "tiles", "wgmma", "bitmask").
        batch: rows of x of a program, a power of two from 16 to 256 ("wgmma").
        cluster: programs that share these ("wgmma" and "bitmask").
        joined: "unpack_then_gemm" multiplies by S + B A, not by S, B and A.
    """

    kernel: str
    rows: int = 0
    warps: int = 0
    split: int = 1
    ahead: int = 0
    resident: int = 1
    batch: int = 0
    cluster: int = 1
    joined: bool = False

    @property
    def order(self) -> tuple:
        """Summation order. Configurations with the same order give bit-identical results."""
        return self.kernel, self.warps, self.split

    @property
    def shares(self) -> int:
        """How many weights with the same input one launch takes: of "wgmma" as many as C takes arguments for."""
        return {"gemv": 64, "vector": 64, "small_batch": 64, "mma": 64, "wgmma": 4}.get(self.kernel, 1)

    def __str__(self) -> str:
        if not (self.rows or self.warps):
            return self.kernel + " joined" * self.joined
        more = f" / {self.split}" * (self.split > 1) + f" {self.ahead} ahead" * (self.ahead > 0)
        more += f" {self.resident} resident" * (self.resident > 1)
        if self.batch:
            return f"{self.kernel} {self.rows} x {self.batch}{more}" + f" clusters of {self.cluster}" * (
                self.cluster > 1
            )
        rows = f" {self.rows} rows" * (self.rows > 0)
        return f"{self.kernel}{rows} {self.warps} warps{more}"


GEMV = (  # of one order
    LaunchConfig("gemv", 4, 4),
    LaunchConfig("gemv", 2, 4),
    LaunchConfig("gemv", 8, 4),
)
SMALL_BATCH = (
    LaunchConfig("small_batch", 16, 8, split=2),
    LaunchConfig("small_batch", 16, 4),
    LaunchConfig("small_batch", 16, 8, ahead=1),
    LaunchConfig("small_batch", 16, 8, split=2, ahead=1),
    LaunchConfig("small_batch", 16, 4, split=4),
    LaunchConfig("small_batch", 16, 4, split=4, ahead=1),
    LaunchConfig("small_batch", 16, 2, split=4, ahead=1),
)
MMA = (LaunchConfig("mma", 16, 8, resident=2), LaunchConfig("mma", 16, 8, resident=3))
MMA_PAIRS = (  # of 2:4
    LaunchConfig("mma", 16, 8, ahead=4, resident=3),
    LaunchConfig("mma", 16, 8, ahead=1, resident=3),
    LaunchConfig("mma", 16, 4, ahead=4, resident=4),
    LaunchConfig("mma", 16, 4, ahead=1, resident=6),
)
MMA_WIDE = (LaunchConfig("mma", 16, 8), LaunchConfig("mma", 32, 8))  # for more than 16 rows of x
MMA_PAIRS_WIDE = (
    LaunchConfig("mma", 16, 8, ahead=1, resident=2),
    LaunchConfig("mma", 32, 8, ahead=1),
    LaunchConfig("mma", 32, 4, ahead=1, resident=2),
)
TILES = tuple(
    LaunchConfig("tiles", rows, 4, split=split, resident=2 if rows == 16 else 1)
    for rows, split in ((32, 1), (32, 2), (32, 4), (16, 1), (16, 2), (16, 4), (16, 8))
)
MEDIUM_BATCH = tuple(LaunchConfig("medium_batch", 64, 4, split=split) for split in (1, 2, 4, 8))
VECTOR = LaunchConfig("vector", 0, 16, ahead=2)
JOINED = LaunchConfig("unpack_then_gemm", joined=True)
BESIDE = LaunchConfig("unpack_then_gemm")

# kind of weight: (up to so many rows of x, the configurations to try). Of equal times the first is taken.
TABLE = {
    "native 2:4": (
        (1, (*MMA_PAIRS[:2], GEMV[0])),
        (FEW_ROWS, MMA_PAIRS),
        (NATIVE_ROWS, (*MMA_PAIRS_WIDE, *TILES)),
        (TILE_ROWS, (*TILES, JOINED)),
        (MOST_ROWS, (JOINED, BESIDE)),
    ),
    "native": (
        (1, (GEMV[0],)),
        (FEW_ROWS, MMA),
        (NATIVE_ROWS, (*MMA_WIDE, *MEDIUM_BATCH)),
        (MEDIUM_ROWS, (*MEDIUM_BATCH, JOINED)),
        (MOST_ROWS, (JOINED, BESIDE)),
    ),
    "16 bits": (
        (1, GEMV),
        (FEW_ROWS, SMALL_BATCH),
        (MEDIUM_ROWS, (*MEDIUM_BATCH, JOINED)),
        (MOST_ROWS, (JOINED, BESIDE)),
    ),
    "32 bits": (
        (FEW_ROWS, (*GEMV, JOINED)),
        (MOST_ROWS, (JOINED, BESIDE)),
    ),
}


def takes_wide(rows: int, outs: int, ins: int, multiprocessors: int) -> bool:
    """Whether "wgmma" is the fastest for a product at 2:4, where it runs. "mma" is for few rows of x, if all of its
    blocks find a place at once and have few columns.

    Args:
        outs: rows of S of all weights that share x.
    """
    if rows > FEW_ROWS or outs * ins < WIDE:
        return rows > FEW_ROWS
    return rows > FEW_ROWS // 2 or (rows > 1 and (outs > 48 * multiprocessors or ins > 4096))


def wide_config(rows: int, outs: int, ins: int, multiprocessors: int) -> LaunchConfig:
    """The configuration of "wgmma" for a product: it need not be measured on each card.

    Args:
        multiprocessors: of the device.
    """
    batch, chunks = min(256, max(16, 1 << (rows - 1).bit_length())), -(-ins // 256)
    shapes = [(64, batch)] if batch <= 64 else [*((128, n) for n in (256, 128, 64) if n <= batch), (64, 64)]
    for tall, batch in shapes:
        resident = 1 if tall == 128 else 2 if batch > 16 else 3
        room, blocks = resident * multiprocessors, -(-outs // tall) * -(-rows // batch)
        if blocks > room * 85 // 100:
            cluster = 2 if batch == 256 and rows * ins >= LARGE_INPUT else 1
            return LaunchConfig("wgmma", tall, resident=resident, batch=batch, cluster=cluster)
        split = _parts(blocks, room, chunks // (2 if rows <= 64 else 4))
        if blocks * split >= room * 70 // 100:
            break
    return LaunchConfig("wgmma", tall, split=split, resident=resident, batch=batch)


def takes_vector(rows: int, outs: int, ins: int) -> bool:
    """Whether "vector" is the fastest for a product with another support than 2:4, where it runs."""
    return rows <= VECTOR_ROWS and outs * ins >= (LARGE if rows == 1 else VECTOR_ENTRIES)


def takes_bitmask(rows: int, outs: int, ins: int) -> bool:
    """Whether "bitmask" is, likewise."""
    fewest = 2 if outs * ins >= LARGE else FEW_ROWS // 2 + 1
    return fewest <= rows <= BITMASK_ROWS and outs * ins >= BITMASK_ENTRIES


def bitmask_config(rows: int, outs: int, multiprocessors: int) -> LaunchConfig:
    """The configuration of "bitmask" for a product, likewise."""
    tall = 128 if outs > 64 * multiprocessors or rows > 128 else 64
    split = 2 if 2 * -(-outs // tall) <= multiprocessors else 1
    narrow, middle = (64, 128) if tall == 128 else (32, 64)  # more rows of x leave room for fewer warps
    return LaunchConfig(
        "bitmask", tall, 16 if rows <= narrow else 12 if rows <= middle and tall == 64 else 8, split=split
    )


def _parts(blocks: int, room: int, most: int) -> int:
    """Of the columns: some room stays for the kernel before, and clusters do not find a place everywhere.

    Args:
        most: parts that are worth it: of few columns there are few.
    """
    return max(1, min(3, room * 85 // 100 // blocks, most))


def candidates(rows: int, weight: PackedWeight, pairs: bool, native: bool) -> tuple[LaunchConfig, ...]:
    """The configurations to try for so many rows of x. The first is taken where none can be measured.

    Args:
        pairs: the weight is 2:4.
        native: there are kernels in CUDA C++ for it.
    """
    if weight.values.element_size() != 2:
        kind = "32 bits"
    elif native:
        kind = "native 2:4" if pairs else "native"
    else:
        kind = "16 bits"
    configs = next(configs for most, configs in TABLE[kind] if min(rows, MOST_ROWS) <= most)
    return configs if weight.A is not None else tuple(config for config in configs if config != BESIDE)


def bucket(rows: int) -> int:
    """Numbers of rows that share a choice: the next power of two."""
    return min(1 << (rows - 1).bit_length(), MOST_ROWS)


def row_key(rows: int) -> int:
    """The number of rows of x under which a binding keeps a product: few as they are, more by their `bucket`."""
    return rows if rows <= NATIVE_ROWS else bucket(rows)
