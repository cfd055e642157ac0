"""Merges adapters into the low-rank factors and cuts the result back to a rank. S stays as it is."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from ...data.calibration import token_rows
from ...nn.linear import SparseLRLinear
from ...solvers.gram import GramAccumulator
from ...utils.modules import eval_mode
from ...utils.validation import check_integer
from .lora_layer import SparseLRLoraLayer

OWN = "own"


def merge_and_unload(
    model: PeftModel,
    rank: int | str | None = None,
    calibration: Any = None,
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
) -> nn.Module:
    """PEFT's `merge_and_unload`, after which no layer's rank exceeds a budget.

    Merging is exact. A replacing adapter takes the place of a layer's factors; additive ones are concatenated to
    them. A layer above the budget then gets the best product of the allowed rank: the nearest to B A in the Frobenius
    norm, or, with calibration data, the one that changes the layer's outputs on them least. No dense weight is built.

    Args:
        model: a PEFT model over a compressed one; it is taken apart.
        rank: the largest rank that a layer may have; "own" for the rank that each layer had without adapters; None
            for no limit.
        calibration: token ids, as a tensor (samples, tokens) or an iterable of tensors, lists or batches.
        adapter_names: the adapters to merge; None for the active ones.
        safe_merge: refuse factors that are not finite.

    Returns:
        The compressed model without adapters; it saves and reloads packed.

    Raises:
        TypeError: the model is no PeftModel, or calibration holds no token ids.
        ValueError: no compressed layer has a LoRA adapter, the rank is negative, calibration is given without a rank,
            or `SparseLRLoraLayer.merge` refuses.
    """
    ranks = _ranks_without_adapters(model)
    if rank is not None and rank != OWN:
        check_integer("rank", rank, 0)
    if rank == OWN and any(layer.hierarchy is not None for layer in ranks):
        raise ValueError(
            f"rank={OWN!r}: the layers' own low-rank part is hierarchical, without a rank to cut adapters back to; "
            "pass a number, for the factors beside it, or None"
        )
    if rank is None and calibration is not None:
        raise ValueError("calibration is for cutting back to a rank: pass rank, or no calibration")
    rows = None if calibration is None else _rows(calibration)
    merged = model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)
    if rank is None:
        return merged
    budget = ranks if isinstance(rank, str) else dict.fromkeys(ranks, rank)
    wide = [layer for layer in ranks if layer.rank > budget[layer]]
    grams = _factor_grams(merged, wide, rows) if rows and wide else {}
    for layer in wide:
        A, B = truncate(*_factors(layer), budget[layer], grams.get(layer))
        layer.A, layer.B = _frozen(A, layer.values), _frozen(B, layer.values)
    return merged


def truncate(
    A: torch.Tensor, B: torch.Tensor, rank: int, gram: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a rank nearest to B A: they minimise |(B A - B' A') X^T|_F for inputs X, or |B A - B' A'|_F.

    Let B = Q R and H = X^T X. The best B' A' is the projection of B A on the leading eigenvectors of R (A H A^T) R^T
    in the basis Q (Eckart-Young in that norm). Of the inputs only A H A^T is needed.

    Args:
        A: (r, in), B: (out, r).
        rank: at most r; 0 allowed.
        gram: (r, r), A H A^T: the Gram matrix of A's outputs. None for H = I.

    Returns:
        A' (rank, in) and B' (out, rank) in FP64. Row i of A' and column i of B' have equal norms.
    """
    A, B = A.double(), B.double()
    Q, R = torch.linalg.qr(B)
    inner = A @ A.T if gram is None else gram.double()
    leading = torch.linalg.eigh(R @ inner @ R.T).eigenvectors.flip(1)[:, :rank]
    A, B = leading.T @ R @ A, Q @ leading
    scale = A.norm(dim=1).sqrt()
    return A / scale.clamp_min(torch.finfo(A.dtype).tiny)[:, None], B * scale


def _ranks_without_adapters(model: PeftModel) -> dict[SparseLRLinear, int]:
    """The ranks of the compressed layers before anything was merged into them."""
    if not isinstance(model, PeftModel):
        raise TypeError(f"model is a {type(model).__name__}: expected a PeftModel")
    adapted = [module for module in model.modules() if isinstance(module, SparseLRLoraLayer)]
    if not adapted:
        raise ValueError("no compressed layer of the model has a LoRA adapter, so there is nothing to merge")
    layers = [module for module in model.modules() if isinstance(module, SparseLRLinear)]
    ranks = {layer: layer.rank for layer in layers}
    return {**ranks, **{layer.base_layer: layer.own_rank for layer in adapted}}


def _factors(layer: SparseLRLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a layer whose rank is not 0."""
    return cast(torch.Tensor, layer.A), cast(torch.Tensor, layer.B)


def _rows(calibration: Any) -> list[torch.Tensor]:
    items = [calibration] if isinstance(calibration, torch.Tensor | Mapping) else calibration
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"calibration={calibration!r}: expected token ids, a tensor (samples, tokens) or several")
    rows = [row for i, item in enumerate(items) for row in token_rows(item, f"calibration item {i}")]
    if not rows:
        raise ValueError("calibration is empty: pass at least one row of token ids")
    return rows


@torch.no_grad()
def _factor_grams(
    model: Any, layers: list[SparseLRLinear], rows: list[torch.Tensor]
) -> dict[SparseLRLinear, torch.Tensor]:
    """A H A^T of layers (rank, rank), from the inputs that they see in the model."""
    sums = {layer: GramAccumulator(layer.rank, layer.values.device) for layer in layers}

    def record(layer: SparseLRLinear, inputs: tuple[torch.Tensor, ...]) -> None:
        sums[layer].add(F.linear(inputs[0].float(), _factors(layer)[0].float()))

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        with eval_mode(model):
            for row in rows:
                ids = row.long()[None].to(model.device)
                inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
                model(input_ids=ids, use_cache=False, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: total.gram for layer, total in sums.items()}


def _frozen(factor: torch.Tensor, like: torch.Tensor) -> nn.Parameter | None:
    return nn.Parameter(factor.to(like), requires_grad=False) if factor.numel() else None
