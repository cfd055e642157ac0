"""Where in `values` a packed row continues: small tables derived from the mask once, never stored on disk."""

from dataclasses import dataclass

import torch

from .tensor_cache import TensorCache, apart, version

BLOCK = 64  # columns a table entry, and bits a word of the mask

_LIMIT = 2**31 - 1  # the kernels count values in 32 bits


@dataclass(frozen=True)
class SupportIndex:
    """What the kernels know of the support of S beside the packed mask.

    Attributes:
        shape: (out, ceil(in / 64)): the kernels read the mask in words of 64 columns.
        padded: uint8 (out, 8 ceil(in / 64)), where the mask's own rows are not whole aligned words.
        starts: int32 (out,): the first value of each row. Empty where `per_block` is set.
        offsets: int16 (int32 above 65535 columns), (out, ceil(in / 64)): values of the row before each block, as
            unsigned. Empty where `per_block` is set.
        per_block: the number of values of every block if it is the same everywhere (exact N:M), else 0: then
            there is nothing to look up.
        pairs: every group of four columns keeps exactly two: each value's place is fixed (2:4).
        in_features, nonzeros: of S.
        densest: the most values of a row in 128 columns, from a multiple of 128 on.
        version: of the mask it was made from.
    """

    shape: tuple[int, int]
    padded: torch.Tensor | None
    starts: torch.Tensor
    offsets: torch.Tensor
    per_block: int
    pairs: bool
    in_features: int
    nonzeros: int
    densest: int
    version: int

    def words(self, mask: torch.Tensor) -> torch.Tensor:
        """The bytes to read as words. The index holds no view of the mask: it would keep it alive."""
        return mask if self.padded is None else self.padded


def build_index(mask: torch.Tensor, in_features: int) -> SupportIndex:
    """The index of a packed mask, uint8 (out, ceil(in / 8)). Waits for the device.

    Raises:
        ValueError: 2^31 values or more.
    """
    made_from, mask = version(mask), mask.detach()
    whole = in_features % BLOCK == 0
    as_it_is = whole and mask.is_contiguous() and mask.data_ptr() % 8 == 0
    padded = None if as_it_is else torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).contiguous()
    bytes_ = mask if as_it_is else padded
    shape = (len(mask), bytes_.shape[1] // 8)
    counts = _popcount(bytes_).view(*shape, 8).sum(-1, dtype=torch.int32)
    per_row = counts.sum(1, dtype=torch.int64)
    nonzeros = int(per_row.sum())
    if nonzeros > _LIMIT:
        raise ValueError(f"mask keeps {nonzeros} values: the packed kernels take at most {_LIMIT}")
    equal = whole and counts.numel() > 0 and bool((counts == counts[0, 0]).all())
    per_block = int(counts[0, 0]) if equal else 0
    pairs = per_block == BLOCK // 2 and bool((_bits_by_nibble(bytes_) == 0x22).all())
    wide = torch.int32 if in_features >= 2**16 else torch.int16
    starts, offsets = per_row.cumsum(0) - per_row, counts.cumsum(1) - counts
    if per_block:
        starts, offsets = starts[:0], offsets[:0]
    pairs_of_blocks = torch.nn.functional.pad(counts, (0, counts.shape[1] % 2)).unflatten(1, (-1, 2)).sum(-1)
    densest = int(pairs_of_blocks.max()) if counts.numel() else 0
    # int16 wraps above 2^15; the kernels read it as unsigned.
    return SupportIndex(
        shape,
        padded,
        starts.to(torch.int32),
        offsets.to(wide),
        per_block,
        pairs,
        in_features,
        nonzeros,
        densest,
        made_from,
    )


def _bits_by_nibble(bytes_: torch.Tensor) -> torch.Tensor:
    pairs = bytes_ - ((bytes_ >> 1) & 0x55)
    return (pairs & 0x33) + ((pairs >> 2) & 0x33)


def _popcount(bytes_: torch.Tensor) -> torch.Tensor:
    """Bits set in each uint8."""
    nibbles = _bits_by_nibble(bytes_)
    return (nibbles + (nibbles >> 4)) & 0x0F


_INDICES: TensorCache[SupportIndex] = TensorCache()


def index_of(mask: torch.Tensor, in_features: int) -> SupportIndex:
    """`build_index`, kept as long as the mask lives and is not edited.

    Raises:
        RuntimeError: it would have to be built while a CUDA graph is being captured.
    """
    key = mask.data_ptr(), mask.shape, mask.stride(), mask.device, in_features
    now = version(mask)

    def build() -> SupportIndex:
        return apart(lambda: build_index(mask, in_features), mask.device)

    return _INDICES.keep(key, [mask], build, lambda index: index.version == now)
