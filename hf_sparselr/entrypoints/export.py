"""A compressed model as two ordinary parts, for software without this package: a dense checkpoint and a LoRA."""

import copy
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..format.bitmask import unpack
from ..format.checkpoint import PAYLOAD
from ..integrations.transformers.adapters import reject_adapters
from ..nn.linear import SparseLRLinear, packed_layers
from ..nn.packed_experts import ExpertStack
from ..nn.pointwise import PointwiseConvolution

BASE, ADAPTER = "base", "adapter"


def export_portable(
    model: PreTrainedModel, directory: str | os.PathLike, base_name: str | None = None
) -> tuple[Path, Path]:
    """Writes a compressed model as a plain transformers checkpoint, S with its zeros, and a plain LoRA, B A.

    Together they give the model's outputs in transformers and PEFT, and in software that serves LoRA adapters: every
    scale is 1 (lora_alpha and alpha_pattern repeat r and rank_pattern), without DoRA and modules_to_save. On the disk
    and, while this runs, in memory, S takes the space of dense weights.

    Args:
        model: a compressed model without adapters; merge them first (`merge_and_unload`).
        directory: gets the folders "base" and "adapter".
        base_name: the base's name in the adapter, such as the Hub id under which the base will be published. None:
            the path of the base's folder.

    Returns:
        The two folders.

    Raises:
        TypeError, ValueError: not a compressed model, adapters around its layers, weights that are not in memory, or
            no low-rank factors, or packed experts or a hierarchical low-rank part, which no LoRA can hold.
    """
    layers = _check(model)
    base, adapter = Path(directory) / BASE, Path(directory) / ADAPTER
    _dense_base(model, layers).save_pretrained(base)
    _save_lora(model, layers, adapter, base_name or str(base))
    return base, adapter


def _check(model: PreTrainedModel) -> dict[str, SparseLRLinear]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a compressed transformers model (of a PEFT model, "
            "hf_sparselr.merge_and_unload gives one)"
        )
    layers = packed_layers(model)
    if hierarchical := [name for name, layer in layers.items() if layer.hierarchy is not None]:
        raise ValueError(
            f"{hierarchical[0]} has a hierarchical low-rank part, which a LoRA adapter cannot hold: dequantize() and "
            "save the model, or compress it with low_rank='flat'"
        )
    stacks = [name for name, module in model.named_modules() if isinstance(module, ExpertStack)]
    if stacks:
        raise ValueError(
            f"{stacks[0]} holds packed experts, one parameter of the dense model, where a LoRA has no layers: "
            "dequantize() and save the model"
        )
    if not any(layer.rank for layer in layers.values()):
        raise ValueError("the model holds no compressed layer with low-rank factors: dequantize() and save it")
    reject_adapters(model, "export")
    if offloaded := [name for name, layer in layers.items() if layer.values.is_meta]:
        raise ValueError(f"{offloaded[0]} is not in memory: load the model without offloading")
    return layers


def _dense_base(model: PreTrainedModel, layers: dict[str, SparseLRLinear]) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        dense = type(model)(config)
    packed = {f"{name}.{part}" for name in layers for part in PAYLOAD if part != "bias"}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    for name, layer in layers.items():
        S = unpack(layer.mask, layer.values.detach(), layer.in_features)
        S = S.T.contiguous() if layer.transposed else S
        place, positions = _dense_place(model, name)
        state[f"{place}.weight"] = S.view(*S.shape, *positions)
        if layer.bias is not None:
            state[f"{place}.bias"] = state.pop(f"{name}.bias")
    dense.load_state_dict(state, assign=True)
    dense.tie_weights()
    if hasattr(model, "generation_config"):  # of models that can generate
        dense.generation_config = model.generation_config
    return dense


def _dense_place(model: nn.Module, name: str) -> tuple[str, tuple[int, ...]]:
    """The name that a packed layer has in the dense model, and the kernel (1, ...) of a convolution."""
    outer = name.rpartition(".")[0]
    module = model.get_submodule(outer)
    return (outer, module.kernel_size) if isinstance(module, PointwiseConvolution) else (name, ())


def _save_lora(model: nn.Module, layers: dict[str, SparseLRLinear], directory: Path, base_name: str) -> None:
    from ..integrations.peft.lora_config import lora_config

    config = lora_config(model)  # exact targets, ranks and scales
    config.init_lora_weights = True
    places = {name: _dense_place(model, name) for name in layers}
    ranks = {places[name][0]: layers[name].rank for name in config.target_modules}
    config.target_modules = set(ranks)
    config.rank_pattern = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.fan_in_fan_out = any(layer.transposed for layer in layers.values())
    config.inference_mode = True
    config.modules_to_save = None  # heads are in the base
    config.base_model_name_or_path = base_name
    config.save_pretrained(directory)
    tensors = {}
    for name, layer in layers.items():
        place, positions = places[name]
        for key, factor in {"A": layer.A, "B": layer.B}.items() if layer.rank else ():
            factor = factor.detach().contiguous()
            tensors[f"base_model.model.{place}.lora_{key}.weight"] = factor.view(*factor.shape, *positions)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
