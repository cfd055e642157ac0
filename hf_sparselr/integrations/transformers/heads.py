"""The modules that a new task trains besides the factors: task heads, and weights that no checkpoint held."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ...nn.linear import SparseLRLinear

# Arguments that PEFT's model classes pass to every forward, and those that the classes of single tasks add.
_COMMON = {
    "input_ids",
    "attention_mask",
    "inputs_embeds",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}
_NAMED = {"input_ids", "attention_mask", "inputs_embeds"}  # a model that takes any argument hands others on
_ADDED: dict[str, set[str]] = {
    "CAUSAL_LM": {"labels"},
    "SEQ_2_SEQ_LM": {"labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"},
    "SEQ_CLS": {"labels"},
    "TOKEN_CLS": {"labels"},
    "QUESTION_ANS": {"token_type_ids", "position_ids", "start_positions", "end_positions"},
    "FEATURE_EXTRACTION": set(),
}
_MAPPINGS: dict[str, Mapping[str, Any]] = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
}


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for a model's task; None where PEFT has none, or passes arguments that the model does not take.

    Models that generate are CAUSAL_LM or SEQ_2_SEQ_LM. For others, the mapping decides in which transformers lists
    the class or one of its parents.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    if model.can_generate():
        task: str | None = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    else:
        task = next((task for task, mapping in _MAPPINGS.items() if _is_listed(model, mapping)), None)
    return task if task is not None and _takes(model, _COMMON | _ADDED[task]) else None


def _is_listed(model: nn.Module, mapping: Mapping[str, Any]) -> bool:
    """Whether a mapping {model type: class name or names} has a model's class or one of its parents."""
    listed = {name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)}
    return any(cls.__name__ in listed for cls in type(model).__mro__)


def _takes(model: nn.Module, names: set[str]) -> bool:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return (_NAMED & names if takes_any else names) | {"input_ids"} <= parameters.keys()


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """{dotted name: module} of the modules that a task trains whole, the outermost ones; {} for a plain language model.

    - The heads of a transformers model with a task: modules beside its base model. The output embeddings of a
      language model are none, nor is anything of a bare base model.
    - Modules with parameters that `from_pretrained` did not find in the checkpoint, as the quantizer noted.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    found = {**_task_heads(model), **_new_modules(model)}
    return {name: module for name, module in found.items() if not _has_ancestor(name, found)}


def _has_ancestor(name: str, names: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in names for end in range(1, len(parts)))


def _task_heads(model: PreTrainedModel) -> dict[str, nn.Module]:
    is_language_model = model.can_generate() or _output_embeddings(model) is not None
    if is_language_model or _is_listed(model, modeling_auto.MODEL_MAPPING_NAMES):
        return {}
    words = _input_embeddings(model)
    children = model.named_children()
    return {name: child for name, child in children if _is_head(child) and words not in set(child.modules())}


def _is_head(child: nn.Module) -> bool:
    if isinstance(child, PreTrainedModel) or any(isinstance(m, SparseLRLinear) for m in child.modules()):
        return False
    return any(parameter.is_floating_point() for parameter in child.parameters())


def new_modules(model: PreTrainedModel) -> frozenset[str]:
    """Names of the modules with parameters that were not in the checkpoint; only right after `from_pretrained`.

    transformers marks the parameters that it loads. The input embeddings are left out: a vocabulary is never trained
    unasked.
    """
    words = _input_embeddings(model)
    owners = [(name, module) for name, module in model.named_modules() if name and module is not words]
    return frozenset(name for name, module in owners if not all(map(_is_loaded, _own(module))))


def _new_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    names = getattr(getattr(model, "hf_quantizer", None), "new_modules", ())
    found = {name: model.get_submodule(name) for name in sorted(names)}
    return {name: module for name, module in found.items() if not isinstance(module, SparseLRLinear)}


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters(recurse=False) if parameter.is_floating_point())


def _is_loaded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # speech, vision
        return None


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
