"""Extreme numbers in every numeric field: refused by name at once, or good for a finite model."""

import copy
import json
import math
import random
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers import tiny

from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.config.fields import FIELDS
from hf_sparselr.config.options import DistillOptions, GlobalOptions, OwlOptions, TMOptions
from hf_sparselr.solvers.registry import METHODS, PRECOMPUTED

REFUSED = (math.nan, math.inf, -math.inf, -1, 1e39, 1e308, 2**64, 10**400)
EXTREME = (1e-45, 1e-30, 1e6)
COUNTS = {
    "passes",
    "iterations",
    "max_iterations",
    "min_iterations",
    "refit_rounds",
    "cg_steps",
    "check_every",
}


def groups() -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(field, its options, what else the config needs)."""
    yield "tm", TMOptions, {"refine": "tm"}
    yield "distill", DistillOptions, {"refine": "distill"}
    yield "allocation_options", OwlOptions, {"allocation": "owl", "sparsity": 0.5}
    yield "allocation_options", GlobalOptions, {"allocation": "global", "sparsity": 0.5}
    for name, method in METHODS.items():
        if name != PRECOMPUTED:
            parts = {} if method.low_rank else {"rank": 0}
            yield (
                "method_options",
                method.options,
                {"method": name, **parts, **({} if method.sparse else {"sparsity": None})},
            )


def numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def settings(values: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the name that an error must have, arguments of the config) for every number that a user can set."""
    for value in values:
        for name, field in FIELDS.items():
            if numeric(field.default):
                yield name, {name: value}
        yield "compression", {"compression": value}
        yield "rank_ratio", {"compression": 0.5, "rank_ratio": value}
        yield "damping", {"damping": (value, 0.005)}
        yield "damping", {"damping": (0.005, value)}
        for group, cls, others in groups():
            for option in fields(cls):
                if numeric(option.default):
                    yield f"{group}.{option.name}", {**others, group: {option.name: value}}
                for index in range(len(option.default) if isinstance(option.default, tuple) else 0):
                    items = [value if at == index else item for at, item in enumerate(option.default)]
                    yield f"{group}.{option.name}", {**others, group: {option.name: items}}


def test_impossible_numbers_are_refused_by_name() -> None:
    tried = 0
    for name, arguments in settings(REFUSED):
        with pytest.raises((ValueError, TypeError)) as caught:
            SparseLRConfig(**arguments)
        assert str(caught.value).startswith(f"{name}="), arguments
        tried += 1
    assert tried > 400


def quick(arguments: dict[str, Any]) -> SparseLRConfig:
    """A config for a tiny model, with few iterations and passes."""
    arguments = copy.deepcopy({"refine": None, **arguments})
    for group, few in (("tm", {"passes": 1}), ("distill", {"passes": 1, "self_samples": 0})):
        arguments[group] = {**few, **arguments.get(group, {})}
    if arguments.get("method", "3basil") == "3basil":
        arguments["method_options"] = {**tiny.FAST, **arguments.get("method_options", {})}
    if arguments.get("allocation") == "global":
        arguments["allocation_options"] = {"iterations": 2, **arguments["allocation_options"]}
    small = {"sparsity": "2:4", "rank": 4, "calibration": tiny.IDS, "num_samples": 4, "seq_len": 32}
    if "compression" in arguments:
        del small["sparsity"], small["rank"]
    return SparseLRConfig(**{**small, **arguments})


@pytest.mark.slow
def test_extreme_numbers_work_or_are_refused_by_name() -> None:
    model, worked = tiny.build("llama"), 0
    for name, arguments in settings(EXTREME):
        option = name.rpartition(".")[2]
        if option in COUNTS:
            continue
        try:
            config = quick(arguments)
        except (ValueError, TypeError) as error:
            assert option in str(error), arguments
            continue
        try:
            packed = compress(copy.deepcopy(model), config)
        except ValueError as error:
            assert option in str(error) or "model.layers" in str(error), arguments
            continue
        assert tiny.logits(packed).isfinite().all(), arguments
        worked += 1
    assert worked > 50


ODD = (
    None,
    True,
    False,
    "",
    "x",
    "2:4",
    "4:2",
    "tm",
    "self",
    "file:",
    "(",
    b"x",
    [],
    {},
    (),
    [None],
    {"a": 1},
    {1: {}},
)
ODD += (
    {"q": {"rank": 1}},
    {"passes": 0},
    {"rho": math.nan},
    {"unknown": 1},
    [[1, 2], [3]],
    object(),
    torch.ones(2, 2),
    len,
)
ODD += (*REFUSED, *EXTREME, 0, 1, 2, 0.5, 1.0, 64)


@pytest.mark.slow
def test_ten_thousand_random_configs_work_or_name_a_field_that_was_given() -> None:
    rng, names = random.Random(0), list(FIELDS)
    refused = 0
    for _ in range(10_000):
        arguments = {name: rng.choice(ODD) for name in rng.sample(names, rng.randint(1, 4))}
        try:
            config = SparseLRConfig(**arguments)
        except (ValueError, TypeError) as error:
            assert any(name in str(error) for name in arguments), (arguments, error)
            refused += 1
            continue
        assert SparseLRConfig.from_dict(json.loads(config.to_json_string())) == config, arguments
    assert 1000 < refused < 9900
