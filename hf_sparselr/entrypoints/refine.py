"""`hf_sparselr.refine`: refine a decomposition that was made elsewhere, and pack it."""

import copy
import math
import os
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers import PreTrainedModel

from ..compression.convolutions import LEAF, linear_convolutions, put_linear
from ..compression.distillation import copy_sharing_blocks
from ..compression.experts import compressible_layers
from ..compression.linear_layers import dense_weight, weight_shape
from ..compression.model_structure import find_blocks
from ..compression.plan import Layer, plan_layers
from ..compression.precomputed import Factors, Precomputed
from ..compression.run import compress_in_memory
from ..compression.samples import Samples
from ..config.sparselr_config import SparseLRConfig
from ..data.origin import Origin
from ..format.patterns import Unstructured
from ..integrations.transformers.quantizer import attach
from ..nn.pointwise import is_pointwise
from ..solvers.registry import METHODS, PRECOMPUTED
from ..utils.modules import check_device
from .dense_model import dense_skeleton
from .output import check_folder, check_output, save

Model = str | os.PathLike | PreTrainedModel


def refine(
    model: Model | PeftModel,
    config: SparseLRConfig,
    output_dir: str | os.PathLike | None = None,
    *,
    reference: Model | None = None,
    adapter: str | os.PathLike | None = None,
    **load_kwargs: Any,
) -> PreTrainedModel:
    """Refines and packs a model that is already pruned, without solving its layers again.

    S of a layer is its weight, zeros included, and its nonzeros are the support of S. B and A are the LoRA adapter,
    where there is one; all other layers have rank 0. The refinement that `config.refine` names matches `reference`. No
    entry outside the support changes.

    Args:
        model: a dense model with zeros in its linear layers, or such a base with additive LoRA (a `peft.PeftModel`): an
            object, a Hub name or a directory. An object is left as it is; the result shares its tensors that were not
            compressed.
        config: as for `compress`. Sparsity and rank, if given here or in `overrides`, are checked against every layer;
            otherwise they are recorded as found (a fraction). Method and its options are not used: config.json says
            `method="precomputed"`.
        output_dir: where to write the packed checkpoint, as in `compress`.
        reference: the dense model that was pruned, an object, a Hub name or a directory. It is not changed.
        adapter: a Hub name or a directory of a LoRA adapter for `model`.
        load_kwargs: for `from_pretrained`, of models given by name.

    Returns:
        The packed model, as from `compress`.

    Raises:
        TypeError, ValueError: naming the field or layer, and what is allowed.
    """
    _check_arguments(model, config, reference, adapter)
    check_device(config.device)
    if output_dir is not None:
        check_folder(output_dir)
    planned = _planning_config(config)
    origin, samples, dense = _dense_and_samples(reference, config, planned, load_kwargs)
    pruned, factors = _base_and_factors(model, adapter, planned, load_kwargs)
    layers = plan_layers(pruned, planned)
    put_linear(pruned, layers)
    with linear_convolutions(dense, layers):
        plan = _found(pruned, factors, config, layers)
        _check_reference(dense, pruned, plan)
        processors = check_output(output_dir, pruned, plan, origin, config.tokenizer) if output_dir is not None else []
        found = _found_config(config, pruned, plan)
        report = compress_in_memory(pruned, plan, found, samples, Precomputed(dense, factors))
    attach(pruned, found.stored(), report)
    if output_dir is not None:
        save(pruned, output_dir, processors)
    return pruned.eval()


def _check_arguments(model: Any, config: SparseLRConfig, reference: Any, adapter: Any) -> None:
    if not isinstance(config, SparseLRConfig):
        raise TypeError(f"config={config!r}: expected a hf_sparselr.SparseLRConfig")
    if reference is None:
        raise ValueError("reference=None: refinement matches the dense model that was pruned; pass it, or its name")
    if config.refine is None:
        raise ValueError("refine=None leaves nothing to do: expected 'tm', 'distill' or 'tm+distill'")
    if config.compression is not None or config.allocation != "uniform":
        field = "allocation" if config.compression is None else "compression"
        raise ValueError(
            f"{field}={getattr(config, field)!r} chooses sparsity and rank, but those of a pruned model are given: "
            "leave it out"
        )
    if config.low_rank != "flat":
        raise ValueError(
            f"low_rank={config.low_rank!r}: a pruned model and an adapter have a flat low-rank part, expected 'flat'"
        )
    if adapter is not None and isinstance(model, nn.Module):
        raise ValueError(
            f"adapter={adapter!r} goes with a model given by name: pass peft.PeftModel.from_pretrained(model, adapter)"
        )
    for field, given in (("model", model), ("reference", reference)):
        _check_dense(field, given)


def _check_dense(field: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"{field}={base.config.name_or_path!r} is already quantised ({method}): expected dense weights"
        )
    if getattr(base, "_hf_peft_config_loaded", False) or (field == "reference" and base is not model):
        raise ValueError(
            f"{field}={base.config.name_or_path!r} has adapters loaded into it: pass "
            + ("the dense model" if field == "reference" else "a peft.PeftModel")
        )


def _planning_config(config: SparseLRConfig) -> SparseLRConfig:
    """A config that chooses the same layers, and asks for a sparsity only if the user did."""
    planned = copy.deepcopy(config)
    planned.method, planned.rank = "3basil", 0
    if not _asked(config, {}, "sparsity"):
        planned.sparsity = 0.0
    return planned


def _asked(config: SparseLRConfig, own: dict, field: str) -> bool:
    """Whether a user set sparsity or rank, in an override or for all layers."""
    return field in own or (config.was_given(field) and getattr(config, field) is not None)


def _dense_and_samples(
    reference: Model, config: SparseLRConfig, planned: SparseLRConfig, load_kwargs: dict
) -> tuple[Origin, Samples, PreTrainedModel]:
    """The dense model, and before its weights are read, its layers and the calibration data are checked."""
    if isinstance(reference, nn.Module):
        plan_layers(reference, planned)
        origin = Origin.of_model(reference)
        return origin, Samples.load(reference, config, origin), reference
    origin = Origin.of_name(os.fspath(reference), load_kwargs)
    cls, skeleton = dense_skeleton(origin)
    plan_layers(skeleton, planned)
    samples = Samples.load(skeleton, config, origin)
    return origin, samples, cls.from_pretrained(origin.name, **load_kwargs)


def _base_and_factors(
    model: Model | PeftModel, adapter: Any, planned: SparseLRConfig, load_kwargs: dict
) -> tuple[PreTrainedModel, dict[str, Factors]]:
    """The pruned model, whose blocks share their tensors with the one given, and the adapter's factors."""
    if not isinstance(model, nn.Module):
        origin = Origin.of_name(os.fspath(model), load_kwargs)
        cls, skeleton = dense_skeleton(origin)
        plan_layers(skeleton, planned)
        model = cls.from_pretrained(origin.name, **load_kwargs)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, os.fspath(adapter))
    if not isinstance(model, PeftModel):
        return copy_sharing_blocks(model, find_blocks(model)), {}
    if not isinstance(model.base_model, LoraModel):
        raise ValueError(f"model has adapters of type {model.peft_type}: expected LoRA, which gives B and A")
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    factors = {_name_as_linear(name, layer): _layer_factors(name, layer) for name, layer in layers.items()}
    own = copy_sharing_blocks(model, find_blocks(model.get_base_model())).unload()
    return own, {name: pair for name, pair in factors.items() if pair is not None}


def _name_as_linear(name: str, layer: LoraLayer) -> str:
    return f"{name}.{LEAF}" if is_pointwise(layer.get_base_layer()) else name


def _layer_factors(name: str, layer: LoraLayer) -> Factors | None:
    """(A, B) of the active adapters of a layer, with their scaling; None if it has none."""
    if layer.merged:
        raise ValueError(f"{name}: its adapter is merged into the weight, whose support is lost: unmerge it")
    active = [] if layer.disable_adapters else [key for key in layer.active_adapters if key in layer.scaling]
    for key in active:
        if key not in layer.lora_A or key in layer.lora_variant or layer.lora_bias.get(key):
            raise ValueError(
                f"{name}: adapter {key!r} cannot become B and A: only plain additive LoRA of a linear layer can, "
                "not DoRA, other variants, lora_bias or embeddings"
            )
    if not active:
        return None
    A = torch.cat([layer.lora_A[key].weight.detach().flatten(1) for key in active])
    B = torch.cat([layer.scaling[key] * layer.lora_B[key].weight.detach().flatten(1) for key in active], dim=1)
    return A, B


def _found(
    model: PreTrainedModel, factors: dict[str, Factors], config: SparseLRConfig, plan: dict[str, Layer]
) -> dict[str, Layer]:
    """The plan with every layer's pattern and rank as they are.

    Raises:
        ValueError: an adapter on a layer that stays dense; a sparsity or rank that is not the one asked for.
    """
    if dense := sorted(factors.keys() - plan.keys()):
        raise ValueError(
            f"{dense[0]} has an adapter, but is no layer that is compressed (see targets, ignore and overrides): it "
            "cannot keep it"
        )
    layers = compressible_layers(model)
    return {name: _found_layer(layers[name], factors, config, layer) for name, layer in plan.items()}


def _found_layer(module: nn.Module, factors: dict[str, Factors], config: SparseLRConfig, layer: Layer) -> Layer:
    name, own = layer.name, config.override_of(layer.name)
    rank = len(factors[name][0]) if name in factors else 0
    asked = own.get("rank", config.rank)
    if _asked(config, own, "rank") and rank != asked:
        raise ValueError(f"{name}: rank={asked} was asked for, but its adapter has rank {rank}")
    mask = dense_weight(module) != 0
    kept = int(mask.sum())
    if not _asked(config, own, "sparsity"):
        return Layer(name, Unstructured.keeping(kept, mask.numel()), rank)
    if not layer.pattern.allows(mask):
        raise ValueError(
            f"{name}: its {kept} nonzeros of {mask.numel()} do not obey sparsity={str(layer.pattern)!r}; leave "
            "sparsity out to refine what is there"
        )
    return Layer(name, layer.pattern, rank)


def _found_config(config: SparseLRConfig, model: PreTrainedModel, plan: dict[str, Layer]) -> SparseLRConfig:
    """The config for config.json: method "precomputed", and sparsity and rank as found if they were not asked for."""
    found = copy.deepcopy(config)
    found.method, found.method_options = PRECOMPUTED, METHODS[PRECOMPUTED].options()
    if not _asked(config, {}, "sparsity"):
        layers = compressible_layers(model)
        shapes = {name: weight_shape(layers[name]) for name in plan}
        kept = sum(layer.pattern.kept(shapes[name]) for name, layer in plan.items())
        found.sparsity = 1 - kept / sum(map(math.prod, shapes.values()))
    if not _asked(config, {}, "rank"):
        found.rank = max(layer.rank for layer in plan.values())
    return found


def _check_reference(reference: PreTrainedModel, model: PreTrainedModel, plan: dict[str, Layer]) -> None:
    theirs = {name: weight_shape(layer) for name, layer in compressible_layers(reference).items()}
    layers = compressible_layers(model)
    for name in plan:
        shape = weight_shape(layers[name])
        if theirs.get(name) != shape:
            raise ValueError(
                f"reference={reference.config.name_or_path!r} is not the dense model: {name} is {shape} in the model, "
                f"{theirs.get(name)} in the reference"
            )
