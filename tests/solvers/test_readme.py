"""The method that the README of solvers adds: its error is the least for its support, and it compresses a model."""

import re
import sys
from types import ModuleType

import pytest
from helpers.layer_problems import TWO_OF_FOUR, problem
from helpers.layer_references import in_scale, least_error
from helpers.paths import ROOT
from helpers.subprocesses import check

from hf_sparselr.solvers.registry import METHODS, Method


def source() -> str:
    readme = (ROOT / "hf_sparselr" / "solvers" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    return code


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Method:
    module = ModuleType("hf_sparselr.solvers.wanda_fit")
    module.__package__ = "hf_sparselr.solvers"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source(), module.__dict__)
    monkeypatch.setitem(METHODS, "wanda-fit", Method("wanda_fit"))
    return METHODS["wanda-fit"]


@pytest.mark.parametrize("rank", [0, 4])
def test_its_error_is_the_least_for_its_support(method: Method, rank: int) -> None:
    weight, gram = problem(24, 16)
    result = method.solve(weight, gram, TWO_OF_FOUR, rank, method.options())
    assert TWO_OF_FOUR.allows(result.mask)
    remainder = in_scale(weight * ~result.mask, gram)
    assert result.stats["objective"] == pytest.approx(least_error(remainder, gram, rank), rel=1e-4)


def test_it_compresses_a_model(tmp_path) -> None:
    """In a process of its own: the config reads the names of the methods once."""
    code = f"""
import sys, types
from hf_sparselr.solvers.registry import METHODS, Method
module = sys.modules["hf_sparselr.solvers.wanda_fit"] = types.ModuleType("wanda_fit")
module.__package__ = "hf_sparselr.solvers"
exec({source()!r}, module.__dict__)
METHODS["wanda-fit"] = Method("wanda_fit")

import torch
from helpers import tiny
import hf_sparselr
model = hf_sparselr.compress(tiny.build("llama"), tiny.settings(method="wanda-fit", method_options=None))
assert {{row["rank"] for row in model.sparselr_report.layers}} == {{4}}
assert torch.isfinite(tiny.logits(model)).all()
"""
    check(code, ROOT, ROOT / "tests", cwd=tmp_path, torch_imported=True)
