"""The method that the README of solvers adds: its error is the least for its support, and it compresses a model."""

import re
import sys
from types import ModuleType

import pytest
import torch
from helpers import tiny
from helpers.layer_problems import TWO_OF_FOUR, problem
from helpers.layer_references import in_scale, least_error
from helpers.paths import ROOT

import hf_sparselr
from hf_sparselr.solvers.registry import METHODS, Method


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Method:
    readme = (ROOT / "hf_sparselr" / "solvers" / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    module = ModuleType("hf_sparselr.solvers.wanda_fit")
    module.__package__ = "hf_sparselr.solvers"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    monkeypatch.setitem(METHODS, "wanda-fit", Method("wanda_fit"))
    return METHODS["wanda-fit"]


@pytest.mark.parametrize("rank", [0, 4])
def test_its_error_is_the_least_for_its_support(method: Method, rank: int) -> None:
    weight, gram = problem(24, 16)
    result = method.solve(weight, gram, TWO_OF_FOUR, rank, method.options())
    assert TWO_OF_FOUR.allows(result.mask)
    remainder = in_scale(weight * ~result.mask, gram)
    assert result.stats["objective"] == pytest.approx(least_error(remainder, gram, rank), rel=1e-4)


def test_it_compresses_a_model(method: Method) -> None:
    model = hf_sparselr.compress(tiny.build("llama"), tiny.settings(method="wanda-fit", method_options=None))
    assert {row["rank"] for row in model.sparselr_report.layers} == {4}
    assert torch.isfinite(tiny.logits(model)).all()
