"""The plan: which linear layers of a model are compressed, each with its pattern and rank."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers.utils import logging

from ..config.hierarchy import check_installed
from ..data.self_generation import can_generate_text
from ..format.hierarchy import HierarchyShape
from ..format.patterns import Pattern
from ..solvers.registry import PRECOMPUTED
from ..utils.validation import covers, matches
from .experts import compressible_layers
from .linear_layers import weight_shape
from .model_structure import Stacks, shared_tensors

if TYPE_CHECKING:
    from ..config.sparselr_config import SparseLRConfig


logger = logging.get_logger("hf_sparselr")

_EDITED = "the model writes to their weights while it runs"
_NO_LAYERS = "their module does not multiply with the weights of one expert at a time"


@dataclass(frozen=True)
class Layer:
    """One linear layer to compress.

    Attributes:
        name: dotted.
        pattern: of S.
        rank: of B A, or of the outermost blocks of a hierarchy.
        hierarchy: how the low-rank part is split; None if it is flat.
    """

    name: str
    pattern: Pattern
    rank: int
    hierarchy: HierarchyShape | None = None

    @property
    def flat_rank(self) -> int:
        """Of B A alone."""
        return self.rank if self.hierarchy is None else 0

    def low_rank_values(self, shape: tuple[int, int]) -> int:
        """Floats in the low-rank part of a layer of shape (out, in)."""
        return self.rank * sum(shape) if self.hierarchy is None else self.hierarchy.parameters


def plan_layers(model: nn.Module, config: "SparseLRConfig") -> dict[str, Layer]:
    """The layers that a config chooses, with their settings: {dotted name: layer}, in order of definition.

    It needs shapes only, so it works on the meta device. It is made once for a run and passed on.

    Raises:
        ImportError: a permutation needs a package that is not installed.
        ValueError: a pattern that matches nothing, a layer that fits neither pattern nor rank, experts that would
            stay dense, no layer left, distillation of a model that cannot have it.
    """
    if config.method == PRECOMPUTED:
        raise ValueError(
            f"method={PRECOMPUTED!r} marks decompositions that were made elsewhere: choose a method that solves, or "
            "refine what is there with hf_sparselr.refine"
        )
    _check_distillable(model, config)
    if config.hierarchy is not None:
        check_installed(config.hierarchy)
    layers = compressible_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers in its blocks: nothing can be compressed")
    for field in ("targets", "overrides"):
        for pattern in getattr(config, field) or ():
            if not any(covers(pattern, name) for name in layers):
                raise ValueError(f"{field}: {pattern!r} matches no layer; layers are {_shorten(layers)}")
    modules = [name for name, _ in model.named_modules()]
    for pattern in config.ignore or ():
        if not any(matches(pattern, name) for name in modules):
            raise ValueError(f"ignore: {pattern!r} matches no module; layers are {_shorten(layers)}")
    shared = shared_tensors(model)
    plan, misfits, tied = {}, [], []
    for name, layer in layers.items():
        if any(covers(pattern, name) for pattern in config.ignore or ()):
            continue
        if config.targets and not any(covers(pattern, name) for pattern in config.targets):
            continue
        settings = config.layer_settings(name, weight_shape(layer))
        if settings is None:
            continue
        if id(layer.weight) in shared:
            tied.append(name)
            continue
        planned = Layer(name, *settings, config.layer_hierarchy(weight_shape(layer), settings[1]))
        problem = _misfit(planned, weight_shape(layer))
        if problem:
            misfits.append(problem)
        else:
            plan[name] = planned
    if misfits and config.on_incompatible == "error":
        raise ValueError(
            f"{misfits[0]}{f' (and {len(misfits) - 1} more layers)' if len(misfits) > 1 else ''}; "
            'use overrides or ignore, or on_incompatible="skip" to leave such layers dense'
        )
    if tied:
        logger.warning(f"{len(tied)} layers stay dense, because several blocks share them: {_shorten(tied, 8)}")
    if misfits:
        logger.warning(f"{len(misfits)} layers stay dense: {'; '.join(misfits[:8])}")
    if not plan and misfits:
        raise ValueError(f"no layer can be compressed: {'; '.join(misfits[:3])}{', ...' if len(misfits) > 3 else ''}")
    if not plan and tied:
        raise ValueError(f"no layer can be compressed: several blocks share {_shorten(tied)}")
    if not plan:
        raise ValueError(f"targets, ignore and overrides leave no layer to compress; layers are {_shorten(layers)}")
    return plan


def _check_distillable(model: nn.Module, config: "SparseLRConfig") -> None:
    """Distillation compares logits, on one device, and may need text that the model writes."""
    if "distill" not in config.refine_steps:
        return
    kind, places = type(model).__name__, set(getattr(model, "hf_device_map", {}).values())
    if model.get_output_embeddings() is None and model.base_model is model:
        raise ValueError(
            f"refine={config.refine!r}: {kind} has no logits to distill; load it with its head (AutoModelForCausalLM "
            "or another), or leave distillation out"
        )
    if len(places) > 1:
        raise ValueError(
            f"refine={config.refine!r}: distillation trains {kind} on one device, but its device_map spreads it over "
            f"{', '.join(sorted(map(str, places)))}; load it on one"
        )
    if config.distill.self_samples and not can_generate_text(model):
        raise ValueError(
            f"distill.self_samples={config.distill.self_samples!r}: {kind} is no decoder that generates text; use 0"
        )


def _misfit(layer: Layer, shape: tuple[int, int]) -> str | None:
    name, pattern, rank = layer.name, layer.pattern, layer.rank
    if not pattern.fits(shape):
        return f"{name}: its {shape[1]} inputs do not divide into the groups of sparsity={str(pattern)!r}"
    if layer.hierarchy is not None:
        problem = layer.hierarchy.problem()
        return problem and f"{name}: {problem}; lower the rank or the depth of its hierarchy"
    if rank and rank >= min(shape):
        return f"{name}: rank={rank} must be smaller than both sides of its weight {shape[0]} x {shape[1]}"
    if not rank and not pattern.kept(shape):
        return f"{name}: a budget this small gives its weight {shape[0]} x {shape[1]} neither S nor a rank"
    return None


def usable_plan(
    plan: dict[str, Layer], unusable: set[str], config: "SparseLRConfig"
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The plan without the experts of parameters that cannot become linear layers, and these with the reason.

    Raises:
        ValueError: there are such parameters, unless `on_incompatible="skip"`.
    """
    dense = {name: _NO_LAYERS for name in plan if name.rpartition(".")[0] in unusable}
    if dense and config.on_incompatible == "error":
        raise ValueError(
            f"experts {_shorten(sorted(unusable))}: {_NO_LAYERS}; leave them dense with "
            f'ignore={sorted(map(re.escape, unusable))[:4]}, or on_incompatible="skip"'
        )
    if dense:
        logger.warning(f"experts {_shorten(sorted(unusable))} stay dense: {_NO_LAYERS}")
    return {name: layer for name, layer in plan.items() if name not in dense}, dense


def reachable_plan(
    plan: dict[str, Layer], stacks: Stacks, called: list[str], edited: set[str], config: "SparseLRConfig"
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The planned layers of the blocks that calibration reaches, and the others with the reason: {layer name: why}.

    Args:
        called: the names of the blocks that a pass over all samples called.
        edited: the layers whose weights the model itself wrote to in that pass.

    Raises:
        ValueError: stacks that no sample reaches, all in one message, unless `on_incompatible="skip"`.
    """
    block_of = {name: block for blocks in stacks.values() for block in blocks for name in _inside(block, plan)}
    missed = {name: block for name, block in block_of.items() if block not in called}
    whole = [stack for stack, blocks in stacks.items() if missed and set(missed.values()) & set(blocks)]
    whole = [stack for stack in whole if not set(stacks[stack]) & set(called)]
    if whole and config.on_incompatible == "error":
        counts = {stack: sum(block in stacks[stack] for block in missed.values()) for stack in whole}
        shown = ", ".join(f"{stack} ({count} layers)" for stack, count in counts.items())
        raise ValueError(
            f"no calibration sample reaches {shown}: pass samples that do, or leave them dense with "
            f"ignore={[re.escape(stack) for stack in whole]}"
        )
    if missed:
        logger.warning(
            f"{len(missed)} layers stay dense, because no calibration sample reaches them: {_shorten(missed, 8)}"
        )
    if edited:
        logger.warning(f"{len(edited)} layers stay dense: {_EDITED}: {_shorten(sorted(edited), 8)}")
    kept = {name: layer for name, layer in plan.items() if name not in missed and name not in edited}
    if not kept:
        raise ValueError("no calibration sample reaches a layer to compress: pass samples that the model's blocks see")
    reached = dict.fromkeys(edited, _EDITED)
    return kept, {**reached, **dict.fromkeys(missed, "no calibration sample reaches its block")}


def _inside(block: str, plan: dict[str, Layer]) -> list[str]:
    return [name for name in plan if name.startswith(f"{block}.")]


def _shorten(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
