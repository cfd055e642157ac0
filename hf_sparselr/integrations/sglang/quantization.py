"""SGLang's view of a compressed checkpoint. Importing this module registers quant_method="sparselr" with SGLang."""

from typing import Any

from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.server_args import add_quantization_method_choices

from ...format.checkpoint import QUANT_METHOD
from ..serving.quantization import PackedLinearMethod, ServingConfig

# SGLang's models merge these layers, but few say so in their `packed_modules_mapping`.
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class SparseLRLinearMethod(PackedLinearMethod, LinearMethodBase):
    """See `PackedLinearMethod`."""


class SparseLRServingConfig(ServingConfig, QuantizationConfig):
    """See `ServingConfig`."""

    linear_layer = LinearBase
    packed_method = SparseLRLinearMethod
    dense_method = UnquantizedLinearMethod

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.update_packed_modules_mapping(config.get("packed_modules_mapping", {}))

    def update_packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        self.packed_modules_mapping = {**MERGED, **mapping}

    def get_scaled_act_names(self) -> list[str]:
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        self.packed_names.rename(hf_to_sglang_mapper.apply_list)


QUANTIZATION_METHODS[QUANT_METHOD] = CPU_QUANTIZATION_METHODS[QUANT_METHOD] = SparseLRServingConfig
add_quantization_method_choices([QUANT_METHOD])
