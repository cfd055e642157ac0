"""Every experts module of the installed transformers gives the same with its experts as layers, dense and packed."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_sparselr.compression.experts import unfuse, weights_of_experts
from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.nn.linear import SparseLRLinear
from hf_sparselr.nn.packed_experts import ExpertStack

DECORATED = re.compile(r"^@use_experts_implementation.*?^class (\w+)", re.MULTILINE | re.DOTALL)


def families() -> dict[str, list[str]]:
    """{model type: its decorated classes}."""
    files = sorted((Path(tf.__file__).parent / "models").glob("*/modeling_*.py"))
    found = {file.parent.name: DECORATED.findall(file.read_text(encoding="utf-8")) for file in files}
    return {name: classes for name, classes in found.items() if classes}


FAMILIES = families()


class SmallConfig:
    """The default config of a class as an experts module reads it, with small numbers."""

    def __init__(self, config: tf.PreTrainedConfig) -> None:
        self._config = config
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        try:
            value = getattr(self._config, name)
        except RuntimeError:  # it has one for each layer
            value = None
        first = value[0] if isinstance(value, list | tuple) and value else value  # of lists for layers
        if first is None or type(first) is int:
            for pattern, small in (("experts$", 4), ("intermediate", 64), ("hidden|dim|latent", 32)):
                if re.search(pattern, name):
                    return small
        return value


def configs(name: str) -> Iterator[SmallConfig]:
    """Configs of a family, those of its parts too."""
    for value in vars(importlib.import_module(f"transformers.models.{name}.configuration_{name}")).values():
        if inspect.isclass(value) and issubclass(value, tf.PreTrainedConfig) and value is not tf.PreTrainedConfig:
            yield SmallConfig(value())


def build(name: str, cls_name: str) -> nn.Module:
    """A decorated module with random weights."""
    cls = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), cls_name)
    errors = []
    for config in configs(name):
        try:
            torch.manual_seed(0)
            experts = cls(config)
        except (AttributeError, TypeError, KeyError) as error:
            errors.append(error)
            continue
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.2)
        return experts.eval()
    raise AssertionError(errors)


def pack(stack: ExpertStack) -> None:
    """Keeps every weight, a third of them as B A."""
    for expert, layer in enumerate(stack):
        weight = layer.weight.detach()
        U, s, V = torch.linalg.svd(weight, full_matrices=False)
        A, B = V[:4].clone(), (U[:, :4] * s[:4]).clone()
        parts = Decomposition(weight - B @ A, torch.ones_like(weight, dtype=torch.bool), A, B)
        stack.add_module(str(expert), SparseLRLinear.from_decomposition(parts))


@torch.no_grad()
def check(name: str, cls_name: str) -> None:
    experts = build(name, cls_name)
    weights = weights_of_experts(experts)
    assert weights, f"{cls_name}: no weights found in {[(k, p.shape) for k, p in experts.named_parameters()]}"
    (count,) = set(weights.values())
    first = getattr(experts, next(iter(weights)))
    width = first.shape[1] if experts.is_transposed else first.shape[2]
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(9, count, generator=generator).topk(2).indices
    given = torch.randn(9, width, generator=generator), index, torch.rand(9, 2, generator=generator)
    expected = experts(*given)
    for key, number in weights.items():
        unfuse(experts, key, number)
    for step in (None, pack):
        for key in weights if step else ():
            pack(getattr(experts, key))
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            experts.config._experts_implementation = implementation
            torch.testing.assert_close(experts(*given), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_every_family(name: str) -> None:
    for cls_name in FAMILIES[name]:
        check(name, cls_name)


def test_every_flag_is_met() -> None:
    flags = {"is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm"}
    modules = [build(name, cls_name) for name, classes in FAMILIES.items() for cls_name in classes]
    for flag in flags & {key for module in modules for key in vars(module)}:
        assert {getattr(module, flag) for module in modules} == {True, False}, flag
