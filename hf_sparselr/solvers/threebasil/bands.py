"""The low-rank bases of the layers of a group.

Those of small layers on a GPU are the diagonal blocks of one matrix, so that a step takes as many kernels for a group
as for a layer. Elsewhere the zeros beside the blocks would cost more than launches do.
"""

from dataclasses import dataclass, field

import torch

from ...utils.availability import TRITON
from ...utils.world import World
from ..base import inverse_factors


@dataclass
class Band:
    """Rows with a common basis matrix.

    Attributes:
        rows: in the stack of all layers.
        ranks: of its layers with a low-rank part.
        basis: P (rows, sum of ranks): orthonormal columns, zero beside the blocks of the layers.
        coefficients: P^T E (sum of ranks, in) of the last step, summed over all processes.
        bases: {index of a layer in the stack: its block of P, a view}.
        inside: (rows, sum of ranks), 1 in the blocks and 0 beside them; None for a single block.
    """

    rows: slice
    ranks: list[int]
    basis: torch.Tensor
    coefficients: torch.Tensor
    bases: dict[int, torch.Tensor] = field(default_factory=dict)
    inside: torch.Tensor | None = None


def set_bases(bands: list[Band], spans: list[torch.Tensor], world: World) -> None:
    """Sets every P to orthonormal columns with the span of its (rows, sum of ranks), block by block; writes to it."""
    for band, span in zip(bands, spans, strict=True):
        if band.inside is not None:
            span *= band.inside
    for C, chosen in _grams(bands, spans):
        world.sum_(C)
        for (band, span), factor in zip(chosen, _factors(C, chosen[0][0].ranks), strict=True):
            torch.mm(span, factor.T, out=band.basis)


def _grams(bands: list[Band], spans: list[torch.Tensor]) -> list[tuple[torch.Tensor, list[tuple[Band, torch.Tensor]]]]:
    """Y^T Y (bands, r, r) of the bands of every width r, with these."""
    widths: dict[int, list[tuple[Band, torch.Tensor]]] = {}
    for band, span in zip(bands, spans, strict=True):
        widths.setdefault(span.shape[1], []).append((band, span))
    return [(torch.stack([span.T @ span for _, span in chosen]), chosen) for chosen in widths.values()]


def _factors(C: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    """`inverse_factors`; those of one band with blocks of one rank block by block, which is faster."""
    count, rank = len(ranks), ranks[0]
    if set(ranks) != {rank}:
        return inverse_factors(C)
    if C.is_cuda and TRITON:
        from . import gpu_steps

        if rank <= gpu_steps.LARGEST_BLOCK and gpu_steps.supports(None):
            return gpu_steps.inverse_factors(C, count)
    if count == 1:
        return inverse_factors(C)
    factors = torch.zeros_like(C)
    _blocks(factors[0], count, rank).copy_(inverse_factors(_blocks(C[0], count, rank).contiguous()))
    return factors


def _blocks(matrix: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """The diagonal blocks (count, rank, rank) of a matrix, as a view."""
    return matrix.view(count, rank, count, rank).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def bands_of(layers: list[tuple[slice, int]], like: torch.Tensor, join: bool) -> list[Band]:
    """The bands of a stack of layers: all in one or one a layer, and none at rank 0.

    Args:
        layers: (rows in the stack, rank) of every layer.
        like: a tensor of the dtype and on the device of the bases.
    """
    ranked = {index: layer for index, layer in enumerate(layers) if layer[1]}
    if join and ranked:
        return [_band(ranked, like)]
    return [_band({index: layer}, like) for index, layer in ranked.items()]


def _band(layers: dict[int, tuple[slice, int]], like: torch.Tensor) -> Band:
    ranks = [rank for _, rank in layers.values()]
    rows = slice(min(own.start for own, _ in layers.values()), max(own.stop for own, _ in layers.values()))
    width = sum(ranks)
    basis = like.new_zeros(rows.stop - rows.start, width)
    band = Band(rows, ranks, basis, like.new_empty(width, like.shape[1]))
    if len(layers) > 1:
        band.inside = torch.zeros_like(band.basis)
    first = 0
    for index, (own, rank) in layers.items():
        block = slice(own.start - rows.start, own.stop - rows.start), slice(first, first + rank)
        band.bases[index] = band.basis[block]
        if band.inside is not None:
            band.inside[block] = 1.0
        first += rank
    return band
