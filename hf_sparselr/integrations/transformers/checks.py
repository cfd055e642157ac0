"""Checks of a packed checkpoint against the model that is loaded from it, before the weights are read."""

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from ...compression.linear_layers import weight_shape
from ...compression.model_structure import linear_layers
from ...compression.plan import Layer
from ...config.sparselr_config import SparseLRConfig
from ...format.checkpoint import (
    SENTINEL,
    Entry,
    FormatError,
    check_layer,
    check_masks,
    group_layers,
    layer_rank,
)
from ...format.checkpoint_hierarchy import PREFIX, owner, read_shape
from ...format.patterns import NM
from ...format.seal import SAVE_ID, check_seal, read_seal
from ...nn.linear import SparseLRLinear
from ...solvers.registry import PRECOMPUTED
from .names import StoredNames, check_dense, is_written_by, missing_tensor, tensor_names, writing_class

if TYPE_CHECKING:  # transformers imports this module before it has the class
    from transformers import PreTrainedModel

Parts = dict[str, Entry]


def check_checkpoint(
    model: "PreTrainedModel", config: SparseLRConfig, entries: Mapping[str, Entry]
) -> tuple[dict[str, Parts], StoredNames]:
    """Checks a whole checkpoint: names, shapes, dtypes, masks, ranks, and that its files belong together.

    Reads headers and masks only. `inspect --verify` compares the weights with their checksums.

    Args:
        model: a skeleton with dense linear layers.
        config: of the checkpoint.
        entries: all tensors of its files.

    Returns:
        The packed layers by their names in the model, {name: {"mask": entry, "values": entry, ...}}, and the names of
        all tensors.

    Raises:
        FormatError: naming the file, and the tensor if it is one.
    """
    if not entries:
        raise FormatError("the files of the checkpoint hold no tensors")
    stored, layers = group_layers(entries), linear_layers(model)
    names = StoredNames(model, tensor_names(model), entries, stored)
    named = {layer: names.layer(layer) for layer in stored}
    for layer, parts in stored.items():
        dense = layers.get(named[layer])
        if dense is None:
            where = next(iter(parts.values())).file
            raise FormatError(f"{where}: tensor {layer}.mask is unexpected: the model has no such linear layer")
        check_layer(layer, parts, *weight_shape(dense), bias=dense.bias is not None)
    _check_names(model, entries, stored, names)
    shapes = {layer: weight_shape(layers[name]) for layer, name in named.items()}
    asked = {layer: _asked(config, layer, named[layer], shapes[layer], model) for layer in stored}
    _check_masks(stored, asked, shapes)
    seals = {entry.file: None for entry in entries.values()}
    ranks = check_seal(entries, {file: read_seal(file) for file in seals}, getattr(config, SAVE_ID, None))
    _check_hierarchies(stored, asked, shapes)
    _check_ranks(stored, config, asked, ranks)
    return {named[layer]: parts for layer, parts in stored.items()}, names


def check_saved(model: "PreTrainedModel", config: SparseLRConfig, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Checks that files which were just written hold every packed layer of a model, as loading will want it.

    Returns:
        The packed layers' names in the files: {name in the model: stored name}.

    Raises:
        FormatError: a layer is not there, has other shapes, or a mask that does not fit its values or the config.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLRLinear)}
    stored = group_layers(entries)
    names = StoredNames(model, tensor_names(model), entries, stored)
    found = {names.layer(layer): layer for layer in stored}
    for name, layer in layers.items():
        if name not in found:
            raise FormatError(f"tensor {name}.mask did not reach the files under a name that leads back to it")
        parts = stored[found[name]]
        check_layer(found[name], parts, layer.out_features, layer.in_features, bias=layer.bias is not None)
        if layer_rank(parts) != layer.rank or parts["values"].shape != layer.values.shape:
            raise FormatError(f"tensor {found[name]}.values in the files is not {name}.values of the model")
    shapes = {found[name]: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    asked = {found[name]: _asked(config, found[name], name, shapes[found[name]], model) for name in layers}
    _check_masks(stored, asked, shapes)
    return {name: found[name] for name in layers}


def changed_ranks(config: SparseLRConfig, layers: Mapping[str, SparseLRLinear]) -> dict[str, int]:
    """Layers whose rank is not the one that the config gives them, after adapters were merged: {name: rank}."""
    if not _fixes_ranks(config):
        return {}
    ranks = {}
    for name, layer in layers.items():
        shape = layer.out_features, layer.in_features
        asked = config.layer_settings(name, shape)
        if asked and layer.rank != Layer(name, *asked, config.layer_hierarchy(shape, asked[1])).flat_rank:
            ranks[name] = layer.rank
    return ranks


def _check_names(
    model: "PreTrainedModel", entries: Mapping[str, Entry], stored: Iterable[str], names: StoredNames
) -> None:
    """Missing, unexpected and wrongly typed tensors, against the class that wrote the checkpoint.

    A class with another head lacks some tensors and has others, so the checkpoint is checked against a skeleton of
    the class that wrote it. Where that is not known, only linear layers of the blocks are looked for.
    """
    packed = {names.layer(layer) for layer in stored}
    if is_written_by(model):
        return check_dense(model, packed, entries, names)
    present = {
        target.rpartition(".")[0]
        for name, targets in names.targets.items()
        for target in targets
        if name in entries and owner(name) not in stored
    }
    for name in linear_layers(model):
        if name not in packed and name not in present:
            raise missing_tensor(model, f"{name}.{SENTINEL}", entries)
    writer = writing_class(model)
    if writer is not None:
        with torch.device("meta"):
            skeleton = writer(copy.deepcopy(model.config))
        names = StoredNames(skeleton, tensor_names(skeleton), entries, stored)
        check_dense(skeleton, {names.layer(layer) for layer in stored}, entries, names)


def _asked(
    config: SparseLRConfig, stored: str, name: str, shape: tuple[int, int], model: "PreTrainedModel"
) -> Layer | None:
    """What the config gives a layer, whose name may have differed in the class that wrote it.

    None where that leaves more than one answer.
    """
    prefix = f"{model.base_model_prefix}."
    names = {stored, name} if is_written_by(model) else {stored, name, name.removeprefix(prefix), prefix + name}
    found = {config.layer_settings(each, shape) for each in names}
    if len(found) > 1 or None in found:
        return None
    pattern, rank = found.pop()
    return Layer(stored, pattern, rank, config.layer_hierarchy(shape, rank))


def _check_masks(
    stored: Mapping[str, Parts], asked: Mapping[str, Layer | None], shapes: Mapping[str, tuple[int, int]]
) -> None:
    patterns = {layer: found.pattern for layer, found in asked.items() if found and isinstance(found.pattern, NM)}
    check_masks(stored, {layer: shape[1] for layer, shape in shapes.items()}, patterns)


def _fixes_ranks(config: SparseLRConfig) -> bool:
    """Whether the config alone gives every layer its rank."""
    return config.allocation == "uniform" and config.method != PRECOMPUTED


def _check_hierarchies(
    stored: Mapping[str, Parts], asked: Mapping[str, Layer | None], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """A hierarchical part may not be lost, or split otherwise than the config says."""
    for layer, parts in stored.items():
        if asked[layer] is None:
            continue
        found, expected = read_shape(parts, *shapes[layer]), asked[layer].hierarchy
        if found != expected:
            names = [f"{PREFIX}.ranks", "values"]
            file = next(parts[name].file for name in names if name in parts)
            told = [shape and list(shape.ranks) for shape in (found, expected)]
            raise FormatError(f"{file}: tensor {layer}.{PREFIX}.ranks says {told[0]}, but the config says {told[1]}")


def _check_ranks(
    stored: Mapping[str, Parts],
    config: SparseLRConfig,
    asked: Mapping[str, Layer | None],
    changed: Mapping[str, int],
) -> None:
    for layer, parts in stored.items():
        expected = changed.get(layer, asked[layer].flat_rank if asked[layer] and _fixes_ranks(config) else None)
        if expected is not None and layer_rank(parts) != expected:
            file = parts["A" if "A" in parts else "values"].file
            raise FormatError(f"{file}: tensor {layer}.A has rank {layer_rank(parts)}, but the config says {expected}")
