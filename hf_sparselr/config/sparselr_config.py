"""SparseLRConfig: everything a user can say, checked before any model is loaded, JSON in and out."""

import copy
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..data import calibration as calibration_sources
from ..format.patterns import EMPTY, Pattern, parse
from ..kernels import KERNELS
from ..solvers.registry import METHODS
from ..utils.validation import (
    anchored,
    build_options,
    check_choice,
    check_integer,
    check_number,
    check_numbers,
    matches,
    reject_unknown,
)
from .options import ALLOCATION_OPTIONS, DistillOptions, TMOptions, budget_pattern, budget_rank
from .presets import PRESETS

QUANT_METHOD = "sparselr"
FORMAT_VERSION = 1
DEFAULT_RANK_RATIO = 0.25
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
        method: the layer solver: "3basil" (arXiv 2603.01376), "oats", "hassle-free-alps", "hassle-free-sparsegpt",
            "eora", "sslc"; pure pruning ("alps", "sparsegpt", "wanda", "magnitude", rank=0); low rank alone ("svd",
            sparsity=None).
        sparsity: "n:m" keeps n of every m consecutive inputs; a fraction in [0, 1) sets exactly
            floor(fraction * out * in) entries of every layer to zero.
        rank: of B A; 0 is pure sparsity.
        compression: c in (0, 1), the share of each layer's parameters to remove, instead of `sparsity` and `rank`
            (None then): S gets the sparsity c + k - c k, and B A the rank floor(k (1 - c) out in / (out + in)).
        rank_ratio: k in [0, 1), the share of the kept parameters that B and A get; 0.25 where None.
        refine: "tm" (transformer matching after every block), "distill" (the whole model against the dense model's
            logits), "tm+distill" (both in turn) or None.
        effort: "fast", "default", "high", or "published", the paper's schedule and precision throughout; fills what
            `method_options`, `tm` and `distill` leave open.
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
        overrides: {regex: {"sparsity": ..., "rank": ..., "skip": bool}}; the first match wins, and beats budget and
            allocation.
        on_incompatible: "error" or "skip" for layers whose shape does not fit the pattern or the rank.
        allocation: "uniform"; "owl" (arXiv 2310.05175): blocks whose Wanda scores have more outliers stay denser;
            "global": each layer's sparsity and rank by its measured errors, at no more parameters than uniform
            settings keep. "n:m" stays what it is: "global" then moves ranks, and "owl" is an error.
        allocation_options: a dict, or `OwlOptions` or `GlobalOptions` of `hf_sparselr.config.options`.
        method_options: options of the method, a dict or its dataclass (`hf_sparselr.solvers.threebasil.Options`).
        tm: options of transformer matching, a dict or `hf_sparselr.config.options.TMOptions`.
        distill: options of distillation, a dict or `hf_sparselr.config.options.DistillOptions`.
        damping: (relative to each diagonal entry of the Gram matrix, relative to their mean).
        tokenizer: for text and chats; None loads it from the model's name. Never serialised.
        device: where blocks are worked on; None: the model's accelerator, else CUDA, else the CPU. Never
            serialised.
        activations: "device" keeps the hidden states of all windows beside the block at work, "host" keeps them in
            main memory and moves one batch at a time. Never serialised.
        kernel: how packed layers compute: "auto" (the fastest, measured once per device), "packed" (S is never unpacked
            for up to 16 rows of input) or "dense" (S + B A stays in memory too). Given with a packed checkpoint, it
            only sets this. Never serialised.

    Raises:
        TypeError, ValueError: naming the field, the value and what is allowed.
    """

    @_noting_arguments
    def __init__(
        self,
        method: str = "3basil",
        sparsity: str | float | None = "2:4",
        rank: int | None = 64,
        compression: float | None = None,
        rank_ratio: float | None = None,
        refine: str | None = "tm",
        effort: str = "default",
        calibration: Any = calibration_sources.DEFAULT,
        num_samples: int = 128,
        seq_len: int = 2048,
        batch_size: int = 8,
        seed: int = 0,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        overrides: dict[str, dict] | None = None,
        on_incompatible: str = "error",
        allocation: str = "uniform",
        allocation_options: Any = None,
        method_options: Any = None,
        tm: Any = None,
        distill: Any = None,
        damping: tuple[float, float] = (0.005, 0.005),
        tokenizer: Any = None,
        device: Any = None,
        activations: str = "device",
        kernel: str = "auto",
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
        self.compression = compression
        self.rank_ratio = rank_ratio
        self.refine = refine
        self.effort = effort
        self.calibration = calibration
        self.num_samples = num_samples
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.targets = _regex_list("targets", targets)
        self.ignore = _regex_list("ignore", ignore)
        self.overrides = {} if overrides is None else overrides
        self.on_incompatible = on_incompatible
        self.allocation = allocation
        self.tokenizer = tokenizer
        self.device = device
        self.activations = activations
        self.kernel = kernel
        check_choice("activations", activations, ("device", "host"))
        check_choice("kernel", kernel, KERNELS)
        check_choice("method", method, tuple(METHODS))
        self._resolve_budget()
        check_choice("allocation", allocation, tuple(ALLOCATION_OPTIONS))
        self.allocation_options = build_options(
            "allocation_options", allocation_options, ALLOCATION_OPTIONS[allocation]
        )
        check_choice("effort", effort, tuple(PRESETS))
        preset = PRESETS[effort]
        self.method_options = build_options(
            "method_options", method_options, METHODS[method].options, preset.get(method)
        )
        self.tm = build_options("tm", tm, TMOptions, preset["tm"])
        self.distill = build_options("distill", distill, DistillOptions, preset["distill"])
        self.damping = check_numbers("damping", damping, 2, 0.0)
        self._check()

    def _resolve_budget(self) -> None:
        """Checks `compression` and `rank_ratio`; they stand for sparsity and rank, which become None."""
        if self.compression is None:
            if self.rank_ratio is not None:
                raise ValueError(
                    f"rank_ratio={self.rank_ratio!r} without compression: it shares out what compression keeps"
                )
            return
        method = METHODS[self.method]
        least, most = 0.0 if method.sparse else 1.0, 1.0 if method.low_rank else 0.0
        if self.rank_ratio is None:
            self.rank_ratio = min(max(DEFAULT_RANK_RATIO, least), most)
        check_number("compression", self.compression, 0, exclusive=True)
        check_number("rank_ratio", self.rank_ratio, 0)
        if self.compression >= 1:
            raise ValueError(f"compression={self.compression!r}: expected a number in (0, 1)")
        if not least <= self.rank_ratio <= most or (self.rank_ratio == 1 and method.sparse):
            allowed = "a number in [0, 1)" if least < most else f"{most:g}"
            raise ValueError(
                f"rank_ratio={self.rank_ratio!r}: expected {allowed} with method={self.method!r}"
            )
        for name in ("sparsity", "rank"):  # a stored config passes every field, these as None
            value = getattr(self, name)
            if name in self._given and value is not None:
                raise ValueError(
                    f"compression={self.compression!r} contradicts {name}={value!r}: a budget sets both sparsity and "
                    "rank; pass either compression (and rank_ratio), or sparsity and rank"
                )
            setattr(self, name, None)

    def _check(self) -> None:
        if self.compression is None:
            self._check_parts()
        self.allocation_options.check(self.pattern, self.rank)
        check_choice("refine", self.refine, ("tm", "distill", "tm+distill", None))
        check_choice("on_incompatible", self.on_incompatible, ("error", "skip"))
        for name, least in (("num_samples", 1), ("seq_len", 2), ("batch_size", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), least)
        if not (isinstance(self.calibration, str) and self.calibration == CUSTOM):
            calibration_sources.check_source(self.calibration)
        if not isinstance(self.overrides, dict):
            raise TypeError(f"overrides={self.overrides!r}: expected {{regex: {{sparsity, rank, skip}}}}")
        for pattern, override in self.overrides.items():
            _check_override(self.method, pattern, override)

    def _check_parts(self) -> None:
        """Sparsity and rank, and whether the method makes both parts."""
        method = METHODS[self.method]
        check_integer("rank", self.rank, 0 if method.sparse else 1)
        if method.sparse:
            parse(self.sparsity)
        elif self.sparsity is not None:
            raise ValueError(
                f"sparsity={self.sparsity!r}: method={self.method!r} has no sparse part, expected None"
            )
        if self.rank and not method.low_rank:
            raise ValueError(
                f"rank={self.rank!r}: method={self.method!r} only prunes, expected 0; for a low-rank part after it use "
                f'method="eora", method_options={{"pruner": {self.method!r}}}'
            )

    @property
    def refine_steps(self) -> tuple[str, ...]:
        """The parts of `refine`, in order."""
        return tuple(self.refine.split("+")) if self.refine else ()

    def override_of(self, name: str) -> dict[str, Any]:
        """The first override that matches a layer, {} if none does."""
        return next((own for pattern, own in self.overrides.items() if matches(pattern, name)), {})

    @property
    def pattern(self) -> Pattern:
        """The uniform pattern of layers without an override."""
        if not METHODS[self.method].sparse:
            return EMPTY
        if self.compression is None:
            return parse(self.sparsity)
        return budget_pattern(self.compression, self.rank_ratio)

    @property
    def has_factors(self) -> bool:
        """Whether layers without an override get B and A."""
        return bool(self.rank or self.rank_ratio)

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
            return pattern, budget_rank(self.compression, self.rank_ratio, shape)
        return pattern, own.get("rank", self.rank)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only: nested options resolved, data as "custom", no runtime objects."""
        runtime = ("tokenizer", "device", "activations", "kernel")
        stored = {k: v for k, v in self.__dict__.items() if k not in runtime and not k.startswith("_")}
        stored["calibration"] = calibration_sources.describe(self.calibration)
        for group in ("method_options", "tm", "distill", "allocation_options"):
            stored[group] = asdict(getattr(self, group))
        return copy.deepcopy({name: _jsonable(value) for name, value in stored.items()})

    def stored(self) -> "SparseLRConfig":
        """A copy as it comes back from config.json, without tokenizer, data and device, for the same kernel."""
        return SparseLRConfig(**self.to_dict(), kernel=self.kernel)

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


def _check_override(name: str, pattern: Any, override: Any) -> None:
    """Checks an override for itself, and whether the method of this name makes the parts it sets."""
    method, field = METHODS[name], f"overrides[{pattern!r}]"
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
        if not method.sparse:
            raise ValueError(f"{field}={override!r}: method={name!r} has no sparse part to set sparsity for")
    if "rank" in override:
        check_integer(f"{field}['rank']", override["rank"], 0 if method.sparse else 1)
        if override["rank"] and not method.low_rank:
            raise ValueError(f"{field}={override!r}: method={name!r} only prunes, expected rank 0")


def _jsonable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value
