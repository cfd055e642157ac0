"""Starts to compile the kernels of a model that is being loaded."""

from threading import Thread
from typing import Any

import torch
from torch import nn

from ...config.sparselr_config import SparseLRConfig
from ...format.patterns import Pattern, Unstructured
from ...kernels.ahead import Kind, compile_ahead
from ...nn.linear import SparseLRLinear, packed_layers
from ...nn.shared_input import layers_by_width


def compile_kernels(model: nn.Module, config: SparseLRConfig, device_map: Any) -> list[Thread]:
    """In threads, for the first GPU to which weights go, else for the CPU if they are known to stay there.

    Args:
        model: its packed layers on the meta device.
        device_map: {module: device}, a strategy such as "auto", or None.
    """
    device = _first_gpu(device_map) or torch.device("cpu")
    if device_map is None and torch.cuda.is_available():
        return []
    names = {layer: name for name, layer in packed_layers(model).items()}
    groups = [
        [_kind(layer, config.layer_pattern(names[layer])) for layer in layers] for layers in layers_by_width(model)
    ]
    return compile_ahead(groups, device)


def _first_gpu(device_map: Any) -> torch.device | None:
    if isinstance(device_map, str):  # such as "auto", which is resolved later
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    places = [place for place in (device_map or {}).values() if place != "disk"]
    devices = (torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in places)
    return next((device for device in devices if device.type == "cuda"), None)


def _kind(layer: SparseLRLinear, pattern: Pattern | None) -> Kind:
    outs, ins, kept = layer.out_features, layer.in_features, layer.values.numel()
    if pattern is None or isinstance(pattern, Unstructured) or pattern.kept((outs, ins)) != kept:
        pattern = Unstructured.keeping(kept, outs * ins)
    return Kind(outs, ins, pattern, layer.rank, layer.bias is not None, layer.dtype)
