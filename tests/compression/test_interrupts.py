"""An interrupt at any line leaves a model given in memory as it was."""

import random
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny

import hf_sparselr
from hf_sparselr import compress
from hf_sparselr.nn.linear import packed_layers

PACKAGE = str(Path(hf_sparselr.__file__).parent)
SETTINGS = {
    "refine": "tm+distill",
    "method_options": {"min_iterations": 2, "max_iterations": 2, "refit_rounds": 0},
    "tm": {"passes": 1},
    "distill": {"passes": 1, "precision": "fp32", "self_samples": 1, "self_len": 4, "checkpointing": True},
    "calibration": tiny.IDS[:2, :8],
    "num_samples": 2,
}


UNDONE_BY = ("compress", "_compress", "restored_on_error")  # after their last lines the model is compressed


class Interrupt(BaseException):
    """As KeyboardInterrupt is, no Exception; pytest lets it through to the test."""


class LineCounter:
    """Counts the lines that run in the package, outside the solver's arithmetic, and interrupts before one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.lines = 0  # so far
        self.work = 0  # lines until the last one of a function that `compress` called
        self.where = ""

    def __enter__(self) -> "LineCounter":
        self._before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame, event, argument):
        file = frame.f_code.co_filename
        return self._on_line if file.startswith(PACKAGE) and "/solvers/" not in file else None

    def _on_line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            self.work = self.lines if frame.f_code.co_name not in UNDONE_BY else self.work
            if self.lines == self.stop:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise Interrupt
        return self._on_line


def build():
    """A model of a user, with flags, gradients and a hook of their own."""
    model = tiny.build("llama-tied", num_hidden_layers=1).train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    model.model.layers[0].self_attn.eval()
    return model


def everything(model) -> list:
    """Modules, tensors and attributes of a model by identity, and its flags."""
    modules = [(name, id(part), part.training, sorted(vars(part))) for name, part in model.named_modules()]
    hooks = [list(part._forward_hooks) + list(part._forward_pre_hooks) for part in model.modules()]
    tensors = [
        (name, id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor.grad is None)
        for name, tensor in model.named_parameters()
    ]
    attributes = {key: id(value) for key, value in vars(model).items() if not key.startswith("_")}
    return [modules, hooks, tensors, attributes, model.config.to_dict(), sorted(vars(model.config))]


@pytest.fixture(scope="module")
def lines() -> int:
    """How many lines run until the model is compressed and attached."""
    for _ in range(2):  # the first run also makes what is made once
        model = build()
        with LineCounter() as counter:
            compress(model, tiny.settings(**SETTINGS))
    assert packed_layers(model) and counter.work > 1000
    return counter.work


@pytest.mark.parametrize("part", range(4))
def test_the_model_is_as_it_was(part, lines):
    stops = random.Random(part).sample(range(1, lines), 12)
    if part == 0:
        stops += range(lines - 40, lines + 1)  # distillation is done, the report is attached
    model = build()
    weights, state = tiny.snapshot(model), everything(model)
    for stop in stops:
        with LineCounter(stop) as counter, pytest.raises(Interrupt):
            compress(model, tiny.settings(**SETTINGS))
        assert everything(model) == state, counter.where
        assert tiny.same(tiny.snapshot(model), weights), counter.where
        assert torch.is_grad_enabled(), counter.where
