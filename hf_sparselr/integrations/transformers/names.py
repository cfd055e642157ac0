"""Names of tensors in the files of a checkpoint and in the model: transformers renames and fuses tensors on the way.

Packed tensors are renamed like any others, but never fused or split: three masks are no mask of a fused layer. A model
of which transformers would fuse packed layers is saved under its own names. Renaming must leave those alone.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ...compression.model_structure import linear_layers
from ...format.checkpoint import DTYPES, FLOATS, SENTINEL, Entry, FormatError
from ...format.checkpoint_hierarchy import owner
from ...nn.linear import SparseLRLinear

if TYPE_CHECKING:  # transformers imports this module before it has the class
    from transformers import PreTrainedModel


class StoredNames:
    """The names that the tensors of a checkpoint have in a model, by the rules with which transformers loads them.

    Attributes:
        targets: {stored name: names of the model's tensors that it becomes}. Several where it is split, and the same
            one for several that are fused.
        are_own: whether the files have the model's own names, which must not be renamed: more of them are the model's
            as they stand than renamed.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tensors: Iterable[str],
        stored: Iterable[str],
        layers: Iterable[str],
        conversions: list | None = None,
    ) -> None:
        """
        Args:
            model: the model, or its skeleton.
            tensors: names of the model's tensors, with a `weight` for every linear layer.
            stored: names of the tensors in the files.
            layers: the packed layers in the files, whose tensors are not fused.
            conversions: transformers' rules; None takes those of the model's class.
        """
        conversions = get_model_conversion_mapping(model) if conversions is None else conversions
        layers = set(layers)
        stored = {*stored, *(f"{layer}.{SENTINEL}" for layer in layers)}
        renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
        converters = [step for step in conversions if isinstance(step, WeightConverter)]
        self._known, self._prefix = dict.fromkeys(tensors, True), model.base_model_prefix
        ordered = sorted(stored, key=dot_natural_key)  # some renamings rely on this order
        renamed = {
            name: self._targets(name, renamings, [] if owner(name) in layers else converters) for name in ordered
        }
        unchanged = {name: self._targets(name, [], []) for name in ordered}
        self.are_own = self._count_known(unchanged) > self._count_known(renamed)
        self.targets = unchanged if self.are_own else {name: self._kept(name, renamed[name]) for name in ordered}

    def _count_known(self, targets: dict[str, list[str]]) -> int:
        return sum(names[0] in self._known for names in targets.values())

    def _kept(self, name: str, targets: list[str]) -> list[str]:
        """Renamed as transformers does, which keeps a name of the model if the new one is none."""
        return [name] if targets[0] not in self._known and name in self._known else targets

    def layer(self, stored: str) -> str:
        """The model's name of a packed layer."""
        return self.targets[f"{stored}.{SENTINEL}"][0].removesuffix(f".{SENTINEL}")

    def _targets(self, name: str, renamings: list, converters: list) -> list[str]:
        target, pattern = rename_source_key(name, renamings, converters, self._prefix, self._known)
        if pattern is None:
            return [target]
        converter = next(step for step in converters if pattern in step.source_patterns)
        first, *others = converter.target_patterns
        return [target, *(target.replace(first, other) for other in others)]


class NoPattern:
    """Stands for the compiled pattern of any step, and matches nothing."""

    groupindex: Mapping[str, int] = {}

    def search(self, name: str) -> None:
        return None


class PatternOutsidePacked:
    """Stands for the compiled pattern of a `WeightConverter`, and matches no tensor of the packed layers."""

    def __init__(self, pattern: re.Pattern, layers: set[str]) -> None:
        self.pattern, self.layers = pattern, layers

    @property
    def groupindex(self) -> Mapping[str, int]:
        return self.pattern.groupindex

    def search(self, name: str) -> re.Match | None:
        return None if owner(name) in self.layers else self.pattern.search(name)


def exclude_packed(conversions: list, layers: Iterable[str], prefix: str) -> list:
    """Keeps converters from the tensors of packed layers, which have these names in the model."""
    for step in conversions:
        if isinstance(step, WeightConverter):
            scopes = {"", f"{prefix}.", f"{step.scope_prefix}.", f"{prefix}.{step.scope_prefix}."}
            names = {layer.removeprefix(scope) for layer in layers for scope in scopes}
            names |= {f"{prefix}.{layer}" for layer in layers}
            step.compiled_sources = PatternOutsidePacked(step.compiled_sources, names)
    return conversions


def exclude_all(conversions: list) -> list:
    """Keeps all steps from all tensors. They stay in the list, for a dense model to be saved under original names."""
    for step in conversions:
        step.compiled_sources = NoPattern()
        step._was_used = not isinstance(step, PrefixChange)  # transformers drops steps that were not
    return conversions


def needs_own_names(model: "PreTrainedModel", layers: Iterable[str]) -> bool:
    """Whether a packed model has to be saved under its own names instead of those of its original checkpoint.

    It has if transformers, to restore the original names, would fuse or split tensors of packed layers, put those of
    one layer into several places, or give them a name that does not lead back to the layer.
    """
    layers, tensors = set(layers), tensor_names(model)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [step for step in conversions if not isinstance(step, PrefixChange)]  # as transformers does
    reverse = [step.reverse_transform() for step in reversed(conversions)]
    converters = [step for step in reverse if isinstance(step, WeightConverter)]
    if any(step.rename_source_key(f"{layer}.{SENTINEL}")[1] for step in converters for layer in layers):
        return True
    original = {}
    for name in sorted(tensors, key=dot_natural_key):
        original[name] = name
        for step in reverse:
            if isinstance(step, WeightRenaming):
                original[name], _ = step.rename_source_key(original[name])
    places: dict[str, str] = {layer: owner(original[f"{layer}.{SENTINEL}"]) for layer in layers}
    torn = any(
        original[name] != places[owner(name)] + name.removeprefix(owner(name))
        for name in tensors
        if owner(name) in layers
    )
    if torn:
        return True
    names = StoredNames(model, tensors, original.values(), places.values())
    return any(names.layer(place) != layer for layer, place in places.items())


def tensor_names(model: nn.Module) -> list[str]:
    """Names of all tensors of a model, with a `weight` for packed layers."""
    packed = (name for name, module in model.named_modules() if isinstance(module, SparseLRLinear))
    return [*model.state_dict(), *(f"{name}.{SENTINEL}" for name in packed)]


def check_dense(model: "PreTrainedModel", packed: set[str], entries: Mapping[str, Entry], names: StoredNames) -> None:
    """Checks that the files hold every dense tensor of the model, no other tensors, and of the right kind of dtype.

    Args:
        model: the model or its skeleton; packed layers may still be dense in it.
        packed: names of its packed layers.
        entries: all tensors of the files.
        names: of the same model and files.

    Raises:
        FormatError: naming file and tensor.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if owner(name) not in packed}
    found, unexpected = set(), {}
    for stored, entry in entries.items():
        targets = names.targets[stored]
        if owner(targets[0]) in packed:
            continue
        known = [target for target in targets if target in state]
        found.update(known)
        if not known:
            unexpected[targets[0]] = stored
        _check_dtype(stored, entry, [state[target].dtype for target in known])
    missing = state.keys() - found - set(model._keys_to_ignore_on_save or ())
    for alike in _names_of_one_tensor(model):
        if any(name in found or name.rpartition(".")[0] in packed for name in alike):
            missing -= alike
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys:
        raise missing_tensor(model, min(info.missing_keys), entries)
    for name in sorted(info.unexpected_keys):
        stored = unexpected[name]
        raise FormatError(f"{entries[stored].file}: tensor {stored} is unexpected: the model has no such tensor")


def _names_of_one_tensor(model: "PreTrainedModel") -> list[set[str]]:
    """Groups of names for tensors that are stored once: tied weights, and those of modules with several names."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[int, set[str]] = {}
    for members in (model.named_parameters, model.named_buffers):
        for name, tensor in members(remove_duplicate=False):
            groups.setdefault(id(tensor), set()).add(name)
    shared = [names for names in groups.values() if len(names) > 1]
    return [*shared, *({tied, source} for tied, source in ties.items())]


def writing_class(model: "PreTrainedModel") -> "type[PreTrainedModel] | None":
    """The class that wrote a checkpoint, where it is not the model's own: its head may differ. None if unknown."""
    names = model.config.architectures or [None]
    cls = getattr(transformers, str(names[0]), None)
    same_config = getattr(cls, "config_class", None) is type(model).config_class
    return cls if same_config and cls is not type(model) else None


def is_written_by(model: "PreTrainedModel") -> bool:
    """Whether the model's class wrote the checkpoint whose config it has."""
    return type(model).__name__ in (model.config.architectures or [])


def _check_dtype(stored: str, entry: Entry, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        if dtype.is_floating_point and entry.dtype not in FLOATS:
            raise FormatError(
                f"{entry.file}: tensor {stored} has dtype {entry.dtype}, expected one of {', '.join(FLOATS)}"
            )
        if not dtype.is_floating_point and not dtype.is_complex and DTYPES.get(entry.dtype) is not dtype:
            raise FormatError(f"{entry.file}: tensor {stored} has dtype {entry.dtype}, expected {dtype}")


def missing_tensor(model: "PreTrainedModel", name: str, entries: Mapping[str, Entry]) -> FormatError:
    """The error for a dense tensor that is not there; a linear layer may be packed instead."""
    layer = name.rpartition(".")[0]
    found = f"{layer}.mask is missing, and so is {name}" if layer in linear_layers(model) else f"{name} is missing"
    return FormatError(f"{_place(entries)}: tensor {found}")


def _place(entries: Mapping[str, Entry]) -> Any:
    """The file if there is one, else their folder."""
    files = {entry.file for entry in entries.values()}
    return next(iter(files)) if len(files) == 1 else Path(next(iter(files))).parent
