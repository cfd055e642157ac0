"""vLLM's view of a compressed checkpoint. Importing this module registers quant_method="sparselr" with vLLM."""

from pathlib import Path
from typing import Any

from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ...format.checkpoint import QUANT_METHOD
from ..serving.quantization import PackedLinearMethod, ServingConfig


class SparseLRLinearMethod(PackedLinearMethod, LinearMethodBase):
    """See `PackedLinearMethod`."""


@register_quantization_config(QUANT_METHOD)
class SparseLRServingConfig(ServingConfig, QuantizationConfig):
    """See `ServingConfig`. At module level, as vLLM sends it to its engine process by pickle."""

    linear_layer = LinearBase
    packed_method = SparseLRLinearMethod
    dense_method = UnquantizedLinearMethod

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Runs in the front end, before the engine starts: a bad checkpoint ends here, before weights are read."""
        if Path(model_name).is_dir():
            self.packed_names.check_files(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.packed_names.rename(hf_to_vllm_mapper.apply_list)
