"""SparseLRConfig: everything a user can say, checked before any model is loaded, JSON in and out."""

import copy
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from . import calibration as calibration_sources
from .checks import (
    anchored,
    build_options,
    check_choice,
    check_integer,
    check_numbers,
    matches,
    reject_unknown,
)
from .matching import TMOptions
from .patterns import Pattern, parse
from .solvers import METHODS

QUANT_METHOD = "sparselr"
FORMAT_VERSION = 1
CUSTOM = "custom"  # what config.json says of calibration data that is not a string

_OVERRIDE_KEYS = ("sparsity", "rank", "skip")


def _noting_arguments(init: Callable) -> Callable:
    """Notes in `_given` which arguments a config was made with: for `differences`, a default may be meant."""

    @functools.wraps(init)
    def noting(self, *args: Any, **kwargs: Any) -> None:
        self._given = {*_argument_names()[: len(args)], *kwargs}
        init(self, *args, **kwargs)

    return noting


class SparseLRConfig(QuantizationConfigMixin):
    """How to replace the weights of a model by S + B A: S sparse, B A of low rank.

    Give it to `from_pretrained(..., quantization_config=...)`, which compresses while it loads, or to
    `hf_sparselr.compress`.

    Args:
        method: the layer solver; "3basil" (arXiv 2603.01376).
        sparsity: "n:m" keeps n of every m consecutive inputs; a fraction in [0, 1) sets exactly
            floor(fraction * out * in) entries of every layer to zero.
        rank: of B A; 0 is pure sparsity.
        refine: "tm" (transformer matching after every block) or None.
        calibration: "self" (text sampled from the model itself), "file:GLOB", a Hub data set id ("id" or
            "id:config"), a list of texts, chats (lists of message dicts), a `datasets.Dataset`, or token ids (a
            2-D integer tensor, or an iterable of integer tensors).
        num_samples: calibration windows.
        seq_len: tokens a window, bounded by the model's context.
        batch_size: windows at a time on the device; bounds memory, does not change results beyond rounding.
        seed: of calibration windows, low-rank start and the order of TM batches.
        targets: regular expressions; a layer is compressed if one matches the end of its dotted name. None: all
            linear layers of the transformer blocks.
        ignore: regular expressions of layers to leave alone; beats `targets`.
        overrides: {regex: {"sparsity": ..., "rank": ..., "skip": bool}}; the first match wins.
        on_incompatible: "error" or "skip" for layers whose shape does not fit the pattern or the rank.
        solver: options of the method, a dict or its dataclass (`hf_sparselr.solvers.threebasil.Options`).
        tm: options of transformer matching, a dict or `hf_sparselr.matching.TMOptions`.
        damping: (relative to each diagonal entry of the Gram matrix, relative to their mean).
        tokenizer: for text and chats; None loads it from the model's name. Never serialised.
        device: where blocks are worked on; None: the model's accelerator, else CUDA, else the CPU. Never
            serialised.

    Raises:
        TypeError, ValueError: naming the field, the value and what is allowed.
    """

    @_noting_arguments
    def __init__(
        self,
        method: str = "3basil",
        sparsity: str | float = "2:4",
        rank: int = 64,
        refine: str | None = "tm",
        calibration: Any = calibration_sources.DEFAULT,
        num_samples: int = 128,
        seq_len: int = 2048,
        batch_size: int = 8,
        seed: int = 0,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        overrides: dict[str, dict] | None = None,
        on_incompatible: str = "error",
        solver: Any = None,
        tm: Any = None,
        damping: tuple[float, float] = (0.005, 0.005),
        tokenizer: Any = None,
        device: Any = None,
        **stored: Any,
    ) -> None:
        version = stored.pop("format_version", FORMAT_VERSION)
        check_integer("format_version", version, 1)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r}: this hf_sparselr reads checkpoints up to version "
                f"{FORMAT_VERSION}; upgrade it to read this one"
            )
        check_choice("quant_method", stored.pop("quant_method", QUANT_METHOD), (QUANT_METHOD,))
        reject_unknown("SparseLRConfig", list(stored), _argument_names())
        self.quant_method = QUANT_METHOD
        self.format_version = version
        self.method = method
        self.sparsity = sparsity
        self.rank = rank
        self.refine = refine
        self.calibration = calibration
        self.num_samples = num_samples
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.targets = _regex_list("targets", targets)
        self.ignore = _regex_list("ignore", ignore)
        self.overrides = {} if overrides is None else overrides
        self.on_incompatible = on_incompatible
        self.tokenizer = tokenizer
        self.device = device
        check_choice("method", method, tuple(METHODS))
        self.solver = build_options("solver", solver, METHODS[method].options)
        self.tm = build_options("tm", tm, TMOptions)
        self.damping = check_numbers("damping", damping, 2, 0.0)
        self._check()

    def _check(self) -> None:
        parse(self.sparsity)
        check_integer("rank", self.rank, 0)
        check_choice("refine", self.refine, ("tm", None))
        check_choice("on_incompatible", self.on_incompatible, ("error", "skip"))
        for name, least in (("num_samples", 1), ("seq_len", 2), ("batch_size", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), least)
        if not (isinstance(self.calibration, str) and self.calibration == CUSTOM):
            calibration_sources.check_source(self.calibration)
        if not isinstance(self.overrides, dict):
            raise TypeError(f"overrides={self.overrides!r}: expected {{regex: {{sparsity, rank, skip}}}}")
        for pattern, override in self.overrides.items():
            _check_override(pattern, override)

    def layer_settings(self, name: str) -> tuple[Pattern, int] | None:
        """(pattern, rank) of a layer that `targets` and `ignore` select, or None where an override skips it."""
        for pattern, override in self.overrides.items():
            if matches(pattern, name):
                if override.get("skip", False):
                    return None
                return parse(override.get("sparsity", self.sparsity)), override.get("rank", self.rank)
        return parse(self.sparsity), self.rank

    def to_dict(self) -> dict[str, Any]:
        """JSON values only: nested options resolved, data as "custom", no runtime objects."""
        runtime = ("tokenizer", "device")
        stored = {k: v for k, v in self.__dict__.items() if k not in runtime and not k.startswith("_")}
        stored["calibration"] = calibration_sources.describe(self.calibration)
        stored["solver"] = asdict(self.solver)
        stored["tm"] = asdict(self.tm)
        return copy.deepcopy({name: _jsonable(value) for name, value in stored.items()})

    def stored(self) -> "SparseLRConfig":
        """A copy as it comes back from config.json: without tokenizer, data and device."""
        return SparseLRConfig(**self.to_dict())

    def differences(self, other: "SparseLRConfig") -> dict[str, tuple[Any, Any]]:
        """Fields that were passed to this config and are not what `other` has: {name: (here, there)}."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {
            name: (value, theirs[name])
            for name, value in mine.items()
            if name in self._given and value != theirs[name]
        }

    def get_loading_attributes(self) -> dict[str, Any]:
        """transformers copies these onto the config of an already compressed checkpoint.

        The whole config travels, so that the quantizer can refuse one that contradicts the checkpoint.
        """
        return {"_requested": self}

    def get(self, key: str, default: Any = None) -> Any:
        """transformers treats a loaded config as a dict in places."""
        return getattr(self, key, default)

    def __deepcopy__(self, memo: dict) -> "SparseLRConfig":
        clone = copy.copy(self)  # tokenizer and data stay shared: they may not be copyable at all
        clone.overrides = copy.deepcopy(self.overrides, memo)
        return clone

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SparseLRConfig) and self.to_dict() == other.to_dict()

    def __iter__(self):
        yield from self.to_dict().items()


def _argument_names() -> list[str]:
    return [name for name in inspect.signature(SparseLRConfig).parameters if name != "stored"]


def _check_regex(field: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{field}={pattern!r}: expected a regular expression over module names")
    try:
        re.compile(pattern)
        re.compile(anchored(pattern))  # refuses global flags such as (?i)
    except re.error as error:
        raise ValueError(f"{field}={pattern!r}: not a regular expression ({error})") from error


def _regex_list(field: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not patterns:
        raise TypeError(
            f"{field}={value!r}: expected a list of regular expressions over module names, or None"
        )
    for pattern in patterns:
        _check_regex(field, pattern)
    return list(patterns)


def _check_override(pattern: Any, override: Any) -> None:
    field = f"overrides[{pattern!r}]"
    _check_regex("overrides", pattern)
    if not isinstance(override, dict) or not override:
        raise TypeError(f"{field}={override!r}: expected a dict with some of {', '.join(_OVERRIDE_KEYS)}")
    reject_unknown(field, list(override), list(_OVERRIDE_KEYS))
    if not isinstance(override.get("skip", False), bool):
        raise TypeError(f"{field}['skip']={override['skip']!r}: expected True or False")
    if override.get("skip") and len(override) > 1:
        raise ValueError(f"{field}={override!r}: skip=True contradicts sparsity and rank")
    if "sparsity" in override:
        parse(override["sparsity"], f"{field}['sparsity']")
    if "rank" in override:
        check_integer(f"{field}['rank']", override["rank"], 0)


def _jsonable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value
