"""The halves of a quantization config and of a linear method that vLLM and SGLang share: both have vLLM's interface."""

from typing import Any

import torch
from torch import nn

from ...format.checkpoint import QUANT_METHOD
from .packed_names import PackedNames
from .shards import PARTS, PackedShards


class ServingConfig:
    """The `quantization_config` of a checkpoint, mixed into an engine's base class.

    Attributes:
        linear_layer: the engine's class of linear layers.
        packed_method, dense_method: its linear methods for packed and dense layers.
        packed_modules_mapping: the engine's merged layers, by their last component.
    """

    linear_layer: type
    packed_method: type["PackedLinearMethod"]
    dense_method: type
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.packed_names = PackedNames(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]):
        return cls(config)

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the Triton kernels compute in BF16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json holds it

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not isinstance(layer, self.linear_layer):
            self.packed_names.refuse_below(prefix, type(layer).__name__)
            return None  # embeddings, attention, experts: as without a quantization method
        packed = self.packed_names.packed(prefix, self.packed_modules_mapping)
        return self.packed_method(prefix) if packed else self.dense_method()


class PackedLinearMethod:
    """S + B A of a linear layer, or of the layers that an engine merged into one. Mixed into its base class.

    Args:
        name: of the layer, for messages.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers an empty parameter for each tensor of the checkpoint: its loader hands the tensor to the shards."""
        layer.shards = PackedShards(
            self.name,
            (sum(output_partition_sizes), input_size_per_partition),
            input_size,
            extra_weight_attrs["weight_loader"],
            params_dtype,
            torch.get_default_device(),  # engines build a model in the context of its device
        )
        for part in PARTS:
            dtype = torch.uint8 if part == "mask" else params_dtype
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            empty.weight_loader = _loader_of(layer.shards, part)
            layer.register_parameter(part, empty)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        bias = getattr(layer, "bias", None)
        layer.shards.finish(None if bias is None else bias.data)
        for part in ("mask", "values", "A", "B"):  # `weight` stays: engines ask for its device
            delattr(layer, part)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.shards(x, bias)


def _loader_of(shards: PackedShards, part: str):
    def load(parameter: nn.Parameter, tensor: torch.Tensor, shard_id: Any = None) -> None:
        shards.load(part, tensor, shard_id)

    return load
