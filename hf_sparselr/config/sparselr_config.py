"""SparseLRConfig: the settings of a compression, checked before any model is loaded, and their form in config.json."""

import copy
import dataclasses
import inspect
import logging
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..format.checkpoint import FORMAT_VERSION, PACKED_LAYERS, QUANT_METHOD
from ..format.hierarchy import HierarchyShape
from ..format.patterns import EMPTY, Pattern, parse
from ..solvers.registry import METHODS
from ..utils.public_names import public_source
from ..utils.validation import build_options, check_choice, check_integer, covers, reject_unknown
from .fields import FIELDS, Fields, documented
from .hierarchy import HierarchyOptions, check_hierarchy, resolve_low_rank
from .kinds import OVERRIDE_KEYS
from .options import ALLOCATION_OPTIONS, DistillOptions, TMOptions, budget_pattern, budget_rank
from .presets import NOISY_WINDOWS, PRESETS

logger = logging.getLogger("hf_sparselr")

DEFAULT_RANK_RATIO = 0.25

_GROUPS = ("allocation_options", "method_options", "tm", "distill", "hierarchy")
_SIGNATURE = inspect.signature(Fields)
_WARNED: set[tuple[str, ...]] = set()  # unknown fields that a warning has named


class _StoredOptions(dict):
    """Method options from config.json, built when they are first asked for: loading a checkpoint needs no solver."""


class SparseLRConfig(Fields, QuantizationConfigMixin):
    __doc__ = documented("""How to replace the weights of a model by S + B A: S sparse, B A of low rank.

    Give it to `from_pretrained(..., quantization_config=...)`, which compresses while it loads, or to
    `hf_sparselr.compress`. `from_dict` reads one from config.json.

    Args:
        {arguments}

    Attributes:
        format_version: of the checkpoint format.
        save_id: of the save that a config was read from, else None. It joins config.json and the weight files.

    Raises:
        TypeError, ValueError: naming the field, the value and what is allowed.
    """)
    __signature__ = _SIGNATURE
    format_version: int
    save_id: str | None
    _given: frozenset[str]
    _method_options: Any

    if not TYPE_CHECKING:  # type checkers read the arguments from `Fields`

        def __init__(self, *args: Any, **fields: Any) -> None:
            reject_unknown("SparseLRConfig", list(fields), list(FIELDS))
            bound = _SIGNATURE.bind(*args, **fields)
            self._given = frozenset(bound.arguments)
            bound.apply_defaults()
            super().__init__(**{n: FIELDS[n].kind.check(n, value) for n, value in bound.arguments.items()})
            self.quant_method = QUANT_METHOD
            self.format_version = FORMAT_VERSION
            self.save_id = None
            self._resolve_budget()
            self._resolve_hierarchy()
            self._build_options()
            self._check()

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "SparseLRConfig":
        """Reads a dict as `to_dict` makes it, or one of arguments.

        A stored config (it has a `format_version`) of a later release may have fields that this one does not know: one
        warning names them.

        Raises:
            TypeError, ValueError: as the constructor, or for a format version that is newer.
        """
        fields = dict(config_dict)
        save_id = fields.pop("save_id", None)
        check_choice("quant_method", fields.pop("quant_method", QUANT_METHOD), (QUANT_METHOD,))
        if "format_version" in fields:
            _check_version(fields.pop("format_version"))
            fields.pop(PACKED_LAYERS, None)  # of the files, written with them
            fields = {"noisy_windows": 0.0} | _known_fields(fields)  # a config without this field is from before it
        made = super().from_dict(fields, return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).save_id = save_id
        return made

    @property
    def method_options(self) -> Any:
        """The dataclass of the method's options."""
        if isinstance(self._method_options, _StoredOptions):
            cls = METHODS[self.method].options
            known = _known_options("method_options", self._method_options, _option_names(cls))
            self._method_options = build_options("method_options", known, cls)
        return self._method_options

    @method_options.setter
    def method_options(self, value: Any) -> None:
        self._method_options = value

    def _build_options(self) -> None:
        """Makes the groups of options dataclasses: given values beat those of `effort`, which beat the defaults."""
        preset = PRESETS[self.effort]
        if self.noisy_windows is None:
            self.noisy_windows = NOISY_WINDOWS[self.effort]
        cls = ALLOCATION_OPTIONS[self.allocation]
        self.allocation_options = build_options("allocation_options", self.allocation_options, cls)
        self.tm = build_options("tm", self.tm, TMOptions, preset["tm"])
        self.distill = build_options("distill", self.distill, DistillOptions, preset["distill"])
        if not isinstance(self._method_options, _StoredOptions):
            cls = METHODS[self.method].options
            self._method_options = build_options("method_options", self._method_options, cls, preset.get(self.method))

    def _resolve_budget(self) -> None:
        """Checks `compression` and `rank_ratio`; they stand for sparsity and rank, which become None."""
        if self.compression is None:
            if self.rank_ratio is not None:
                raise ValueError(
                    f"rank_ratio={self.rank_ratio!r} without compression: it divides what compression keeps"
                )
            return
        method = METHODS[self.method]
        least, most = 0.0 if method.sparse else 1.0, 1.0 if method.low_rank else 0.0
        if self.rank_ratio is None:
            self.rank_ratio = min(max(DEFAULT_RANK_RATIO, least), most)
        if not least <= self.rank_ratio <= most or (self.rank_ratio == 1 and method.sparse):
            allowed = "a number in [0, 1)" if least < most else f"{most:g}"
            raise ValueError(f"rank_ratio={self.rank_ratio!r}: expected {allowed} with method={self.method!r}")
        for name in ("sparsity", "rank"):  # a stored config passes every field, these as None
            value = getattr(self, name)
            if self.was_given(name) and value is not None:
                raise ValueError(
                    f"compression={self.compression!r} contradicts {name}={value!r}: a budget sets both sparsity and "
                    "rank; pass either compression (and rank_ratio), or sparsity and rank"
                )
            setattr(self, name, None)

    def _resolve_hierarchy(self) -> None:
        """Builds the options of `low_rank="hss"`; ranks given by level set `rank`."""
        self.low_rank = resolve_low_rank(self.low_rank, self.method)
        if self.low_rank == "flat":
            if self.hierarchy is not None:
                raise ValueError(f"hierarchy={self.hierarchy!r} without low_rank='hss': it says how to split that")
            return
        self.hierarchy = build_options("hierarchy", self.hierarchy, HierarchyOptions)
        if self.hierarchy.ranks and not self.was_given("rank"):
            self.rank = self.hierarchy.ranks[0]

    def _check(self) -> None:
        """Checks fields that must agree with one another."""
        if self.compression is None:
            self._check_parts()
        self.allocation_options.check(self.pattern, self.rank)
        for pattern, override in (self.overrides or {}).items():
            self._check_override(f"overrides[{pattern!r}]", override)
        if self.low_rank == "hss":
            stored = isinstance(self._method_options, _StoredOptions)
            check_hierarchy(self, None if stored else self._method_options)

    def _check_parts(self) -> None:
        """Checks sparsity and rank, and that the method makes both parts."""
        method = METHODS[self.method]
        check_integer("rank", self.rank, 0 if method.sparse else 1)
        if method.sparse:
            parse(self.sparsity)
        elif self.sparsity is not None:
            raise ValueError(f"sparsity={self.sparsity!r}: method={self.method!r} has no sparse part, expected None")
        if self.rank and not method.low_rank:
            raise ValueError(
                f"rank={self.rank!r}: method={self.method!r} only prunes, expected 0; for a low-rank part after it use "
                f'method="eora", method_options={{"pruner": {self.method!r}}}'
            )

    def _check_override(self, field: str, override: dict[str, Any]) -> None:
        """Checks that the method makes the parts that an override sets."""
        method = METHODS[self.method]
        if "sparsity" in override and not method.sparse:
            raise ValueError(f"{field}={override!r}: method={self.method!r} has no sparse part to set sparsity for")
        if "rank" not in override:
            return
        check_integer(f"{field}['rank']", override["rank"], 0 if method.sparse else 1)
        if override["rank"] and not method.low_rank:
            raise ValueError(f"{field}={override!r}: method={self.method!r} only prunes, expected rank 0")

    def was_given(self, name: str) -> bool:
        """Whether a field was passed to the constructor, even with its default value."""
        return name in self._given

    @property
    def refine_steps(self) -> tuple[str, ...]:
        """The parts of `refine`, in order."""
        return tuple(self.refine.split("+")) if self.refine else ()

    def override_of(self, name: str) -> dict[str, Any]:
        """The first override whose pattern matches a layer or a module above it, {} if none does."""
        overrides = self.overrides or {}
        return next((own for pattern, own in overrides.items() if covers(pattern, name)), {})

    @property
    def pattern(self) -> Pattern:
        """The uniform pattern of layers without an override."""
        if not METHODS[self.method].sparse:
            return EMPTY
        if self.compression is None:
            return parse(self.sparsity)
        return budget_pattern(self.compression, self.rank_ratio or 0.0)

    @property
    def has_factors(self) -> bool:
        """Whether layers without an override get B and A."""
        return self.has_low_rank and not (self.hierarchy and self.hierarchy.depth)

    @property
    def has_low_rank(self) -> bool:
        """Whether layers without an override get a low-rank part, flat or not."""
        return bool(self.rank or self.rank_ratio)

    def layer_hierarchy(self, shape: tuple[int, int], rank: int) -> HierarchyShape | None:
        """How the low-rank part of a layer of shape (out, in) is split; None where it is flat."""
        return None if self.hierarchy is None else self.hierarchy.shape(shape, rank)

    def layer_pattern(self, name: str) -> Pattern | None:
        """The uniform pattern of a layer that `targets` and `ignore` select, or None where an override skips it."""
        own = self.override_of(name)
        if own.get("skip", False):
            return None
        return parse(own["sparsity"]) if "sparsity" in own else self.pattern

    def layer_settings(self, name: str, shape: tuple[int, int]) -> tuple[Pattern, int] | None:
        """Uniform (pattern, rank) of such a layer of shape (out, in), or None where an override skips it."""
        pattern, own = self.layer_pattern(name), self.override_of(name)
        if pattern is None:
            return None
        if "rank" not in own and self.compression is not None:
            return pattern, budget_rank(self.compression, self.rank_ratio or 0.0, shape)
        return pattern, own.get("rank", self.rank) or 0

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values: groups of options as dicts, data as "custom", nothing of one run alone."""
        stored = {name: getattr(self, name) for name, field in FIELDS.items() if field.stored and name not in _GROUPS}
        stored["calibration"] = public_source(self.calibration)
        groups = {name: getattr(self, name) for name in _GROUPS if name != "method_options"}
        groups["method_options"] = self._method_options
        for name, options in groups.items():
            stored[name] = dataclasses.asdict(options) if dataclasses.is_dataclass(options) else options
        kind = {"quant_method": self.quant_method, "format_version": self.format_version}
        if self.save_id is not None:
            kind["save_id"] = self.save_id
        return copy.deepcopy({name: _jsonable(value) for name, value in {**kind, **stored}.items()})

    def stored(self) -> "SparseLRConfig":
        """A copy as it comes back from config.json, without tokenizer, data and device, for the same kernel."""
        copied = SparseLRConfig.from_dict(self.to_dict())
        copied.kernel = self.kernel
        return copied

    def differences(self, other: "SparseLRConfig") -> dict[str, tuple[Any, Any]]:
        """Fields that were passed to this config and are not what `other` has: {name: (here, there)}."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {
            name: (value, theirs[name])
            for name, value in mine.items()
            if self.was_given(name) and value != theirs[name]
        }

    def get(self, key: str, default: Any = None) -> Any:
        """transformers treats a loaded config as a dict in places."""
        return getattr(self, key, default)

    def __deepcopy__(self, memo: dict) -> "SparseLRConfig":
        clone = copy.copy(self)  # tokenizer and data stay shared: they may not be copyable at all
        clone.overrides = copy.deepcopy(self.overrides, memo)
        return clone

    def __eq__(self, other: object) -> bool:
        """Whether the settings are equal, whichever save they were read from."""
        if not isinstance(other, SparseLRConfig):
            return False
        return {**self.to_dict(), "save_id": None} == {**other.to_dict(), "save_id": None}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def _check_version(version: Any) -> None:
    check_integer("format_version", version, 1)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version!r}: this hf_sparselr reads checkpoints up to version {FORMAT_VERSION}; upgrade "
            "it to read this one"
        )


def _known_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stored config that this release knows; a warning names the others."""
    known = {name: value for name, value in stored.items() if name in FIELDS}
    _warn_unknown("", stored.keys() - known.keys())
    classes = {
        "tm": TMOptions,
        "distill": DistillOptions,
        "hierarchy": HierarchyOptions,
        "allocation_options": ALLOCATION_OPTIONS.get(known.get("allocation", "uniform")),
    }
    for name, cls in classes.items():
        if cls is not None and isinstance(known.get(name), dict):
            known[name] = _known_options(name, known[name], _option_names(cls))
    if isinstance(known.get("overrides"), dict):
        known["overrides"] = {
            pattern: _known_options(f"overrides[{pattern!r}]", override, OVERRIDE_KEYS)
            if isinstance(override, dict)
            else override
            for pattern, override in known["overrides"].items()
        }
    if isinstance(known.get("method_options"), dict):
        known["method_options"] = _StoredOptions(known["method_options"])
    return known


def _option_names(cls: type) -> list[str]:
    return [option.name for option in dataclasses.fields(cls)]


def _known_options(field: str, stored: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    _warn_unknown(f"{field}.", stored.keys() - set(names))
    return {name: value for name, value in stored.items() if name in names}


def _warn_unknown(prefix: str, names: Iterable[str]) -> None:
    unknown = tuple(sorted(f"{prefix}{name}" for name in names))
    if unknown and unknown not in _WARNED:
        _WARNED.add(unknown)
        logger.warning(
            "the stored quantization_config has fields that this release of hf_sparselr does not know, and leaves out: "
            "%s (written by a later release)",
            ", ".join(unknown),
        )


def _jsonable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value
