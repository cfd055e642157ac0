"""Parts of a packed S for tensor parallelism: some of its rows, or some of its columns."""

import torch

from .bitmask import pack_mask, unpack_mask


def take_rows(mask: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S[rows], packed.

    Args:
        mask: uint8 (out, ceil(in / 8)), values: (nonzeros,): the packed S.
        rows: int64 (n,), in any order.

    Returns:
        (mask, values) of the n rows, copies.
    """
    counts = _counts(mask)
    ends = counts.cumsum(0)
    runs = _runs(rows.tolist())
    pieces = [values[int(ends[low] - counts[low]) : int(ends[high])] for low, high in runs]
    return mask[rows], torch.cat(pieces) if pieces else values[:0].clone()


def take_columns(mask: torch.Tensor, values: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S[:, start:stop], packed; as (mask, values), copies."""
    kept = unpack_mask(mask, 8 * mask.shape[1])
    within = torch.zeros(kept.shape[1], dtype=torch.bool, device=mask.device)
    within[start:stop] = True
    return pack_mask(kept[:, start:stop]), values[within.expand_as(kept)[kept]]


def _counts(mask: torch.Tensor) -> torch.Tensor:
    """int64 (out,): values of each row."""
    bits = torch.arange(256, device=mask.device)
    ones = sum((bits >> place) & 1 for place in range(8))
    return ones[mask.long()].sum(1)


def _runs(rows: list[int]) -> list[list[int]]:
    """Runs of consecutive rows: [first, last] of each."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    return runs
