"""What one model type goes through: compress, run, save, reload to the bit, generate, an adapter's training step."""

import itertools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

import hf_sparselr

from .inputs import find_inputs, forward, most_kinds, tensors
from .tiny_configs import WAYS, Sizes, tiny_config

SAMPLES = 4
MOST_WEIGHTS = (8_000_000, 40_000_000)  # tiny, and still small
PACKAGE = Path(hf_sparselr.__file__).parent
REFUSALS = (ValueError, TypeError, OSError, NotImplementedError)

Draw = Callable[[int], dict[str, torch.Tensor]]
Built = tuple[Callable[[], tf.PreTrainedModel], Draw]


def try_type(
    config_class: type[tf.PreTrainedConfig],
    model_class: type[tf.PreTrainedModel],
    on_step: Callable[[str], Any] = lambda name: None,
) -> dict[str, Any]:
    """Takes a tiny random model of a type through all steps; `on_step` is told the name of each that begins.

    Returns:
        "outcome": "passes", "refused", "accident" or "no tiny model"; of the last three "step", "error", "where".
        "impossible": steps that the dense model cannot do either. "share": packed part of the blocks' linear weights.
    """
    try:
        make, draw = build(config_class, model_class)
    except Exception as error:  # a type may fail in any way of its own
        return {"outcome": "no tiny model", **_described(error, "build")}
    result: dict[str, Any] = {"outcome": "passes", "impossible": [], "inputs": sorted(draw(0))}
    state: dict[str, Any] = {"draw": draw, "folder": tempfile.TemporaryDirectory()}
    for step in STEPS:
        on_step(step.__name__)
        try:
            model = make() if step is compress else state["model"]
            step(model, state)
        except Exception as error:
            if step is not compress and _fails_dense(step, make, draw):
                result["impossible"].append(step.__name__)
                continue
            result |= {"outcome": "accident", **_described(error, step.__name__)}
            if step in (compress, train) and _is_refusal(error):
                result["outcome"] = "refused"
            break
        finally:
            result["share"] = state.get("share")
    return result


def build(config_class: type[tf.PreTrainedConfig], model_class: type[tf.PreTrainedModel]) -> Built:
    """A function that makes the dense model, the same each time, and one that draws its inputs."""
    first, failed = None, set()
    # Images and text together come before text alone.
    for left_out, most, sizes in itertools.product(range(3), MOST_WEIGHTS, WAYS):
        if (left_out, sizes) in failed:
            continue
        try:

            def make(sizes: Sizes = sizes) -> tf.PreTrainedModel:
                torch.manual_seed(0)
                return model_class(tiny_config(config_class, sizes, model_class.config_class)).eval()

            with torch.device("meta"):
                weights = _weights(make)
            if weights > most:
                first = first or RuntimeError(f"the shrunk model has {weights} weights")
                continue
            model = make()
            if (kinds := most_kinds(model) - left_out) > 0:
                return make, find_inputs(model, kinds)
        except Exception as error:
            first = first or error
        failed.add((left_out, sizes))
    raise first or RuntimeError("forward takes neither text nor images nor sound")


def _weights(make: Callable[[], tf.PreTrainedModel]) -> int:
    try:
        return sum(parameter.numel() for parameter in make().parameters())
    except (RuntimeError, NotImplementedError):  # not every model can be built without values
        return 0


def compress(model: tf.PreTrainedModel, state: dict) -> None:
    samples = [state["draw"](seed) for seed in range(SAMPLES)]
    ids = all(set(sample) == {"input_ids"} for sample in samples)
    config = hf_sparselr.SparseLRConfig(
        sparsity="2:4",
        rank=4,
        refine=None,
        calibration=torch.cat([sample["input_ids"] for sample in samples]) if ids else samples,
        num_samples=SAMPLES,
        seq_len=32,
        effort="fast",
        on_incompatible="skip",
    )
    state["model"] = hf_sparselr.compress(model, config)
    found = model.sparselr_report.coverage
    state["share"] = found["packed"] / max(found["total"], 1)


@torch.no_grad()
def run(model: tf.PreTrainedModel, state: dict) -> None:
    state["outputs"] = tensors(forward(model, state["draw"](0)))


def save(model: tf.PreTrainedModel, state: dict) -> None:
    model.save_pretrained(state["folder"].name)


@torch.no_grad()
def reload(model: tf.PreTrainedModel, state: dict) -> None:
    again = type(model).from_pretrained(state["folder"].name).eval()
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys(), f"reloaded tensors differ: {sorted(old.keys() ^ new.keys())[:3]}"
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert not changed, f"reloaded tensors differ: {changed[:3]}"
    # Dense products may differ in the last bit: the memory of tensors from a file is aligned otherwise.
    outputs = tensors(forward(again, state["draw"](0)))
    for old, new in zip(state["outputs"], outputs, strict=True):
        assert torch.allclose(old, new, rtol=1e-5, atol=1e-5, equal_nan=True), "reloaded outputs differ"


def generate(model: tf.PreTrainedModel, state: dict) -> None:
    if model.can_generate():
        model.generate(**state["draw"](0), max_new_tokens=3, do_sample=False)


def train(model: tf.PreTrainedModel, state: dict) -> None:
    packed = hasattr(model, "sparselr_report")
    settings = hf_sparselr.lora_config(model) if packed else peft.LoraConfig(target_modules="all-linear", r=4)
    adapted = peft.get_peft_model(model, settings).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    outputs = [item for item in tensors(forward(adapted, state["draw"](0))) if item.requires_grad]
    assert outputs, "no output depends on the adapter"
    outputs[0].float().square().mean().backward()
    assert any(parameter.grad is not None for parameter in trained), "the adapter has no gradients"
    torch.optim.SGD(trained, lr=1e-3).step()


STEPS = (compress, run, save, reload, generate, train)


def _fails_dense(step: Callable, make: Callable[[], tf.PreTrainedModel], draw: Draw) -> bool:
    """Whether the dense model fails at a step too, or at one before it."""
    with tempfile.TemporaryDirectory() as folder:
        state = {"draw": draw, "folder": folder}
        state["folder"] = type("Folder", (), {"name": folder})
        needed = {run: (run,), save: (save,), reload: (run, save, reload)}.get(step, (step,))
        try:
            model = make()
            for item in needed:
                item(model, state)
        except Exception:
            return True
    return False


def _is_refusal(error: BaseException) -> bool:
    """Whether the package raised the error itself, in a sentence, rather than ran into it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    raised = (frame.line or "").startswith("raise")  # and not by Python, such as for wrong arguments
    return raised and isinstance(error, REFUSALS) and Path(frame.filename).is_relative_to(PACKAGE)


def _described(error: BaseException, step: str) -> dict[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    places = [f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno}" for frame in own[-1:]]
    last = frames[-1]
    places.append(f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno}")
    line = " ".join(str(error).split())
    line = line if len(line) < 300 else f"{line[:100]} ... {line[-190:]}"  # some quote a whole model
    return {"step": step, "error": f"{type(error).__name__}: {line}", "where": " < ".join(places)}
