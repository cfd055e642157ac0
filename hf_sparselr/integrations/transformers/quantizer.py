"""The transformers quantizer: compress while loading, load packed, save packed.

Importing this module registers `quant_method="sparselr"`; `autoload` does that as soon as transformers is imported.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ...compression.convolutions import restore_convolutions
from ...compression.empty_layer import empty_packed_layer
from ...compression.experts import fuse_experts
from ...compression.model_structure import linear_layers
from ...compression.plan import plan_layers
from ...compression.report import Report
from ...config.sparselr_config import QUANT_METHOD, SparseLRConfig
from ...data.origin import Origin
from ...format.checkpoint import SENTINEL, FormatError, group_layers, read_headers
from ...format.seal import METADATA, room
from ...format.staging import Staging
from ...nn.linear import packed_layers
from ...nn.shared_input import link_shared_inputs
from ...utils.modules import check_device
from ...utils.public_names import hub_id
from .adapters import reject_adapters
from .checks import check_checkpoint
from .compiling import compile_kernels
from .convolutions import put_packed_convolutions
from .experts import unfuse_packed_experts
from .experts_forward import install
from .names import exclude_all, exclude_packed


class SparseLRQuantizer(HfQuantizer):
    """transformers' hooks for sparse plus low-rank weights.

    `pre_quantized` False: the checkpoint is dense and is compressed once it is in memory. True: it is packed; its
    linear layers are replaced by `SparseLRLinear` of the shapes in the files' headers before anything is read.
    """

    requires_calibration = False  # True would make transformers refuse dense checkpoints
    given_state: dict | None = None  # the `state_dict` of the running save_pretrained (see `hub`)
    staging: Staging | None = None  # where the running save_pretrained writes
    hub_name: str | None = None  # the repository that the model was loaded from, or pushed to last
    new_modules: frozenset[str] = frozenset()  # those that no checkpoint held (see `heads`)
    is_qat_trainable = False  # `train_mode` sets it: until then Trainer refuses a model without adapters
    quantization_config: SparseLRConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            return
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if places & {"disk"} or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map={device_map!r} offloads weights, which cannot be compressed while loading: load without "
                "offloading, or use hf_sparselr.compress(name, config, output_dir=...), which keeps the model on the "
                "CPU and works on one block at a time on the GPU"
            )

    # -- before the weights are read

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> nn.Module:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "tp_plan / distributed_config: tensor parallelism is not supported for sparselr models; "
                'use device_map="auto"'
            )
        with torch.device("cpu"):  # transformers builds the skeleton in a meta context; this reads real data
            if self.pre_quantized:
                self._build_packed(model, checkpoint_files)
                self._compiling = compile_kernels(model, self.quantization_config, device_map)
            else:
                from ...compression.samples import Samples

                check_device(self.quantization_config.device)
                self._plan = plan_layers(model, self.quantization_config)
                self._samples = Samples.load(model, self.quantization_config, Origin.of_model(model, checkpoint_files))
        return model

    def _build_packed(self, model: nn.Module, files: list[str] | None) -> None:
        """Replaces the linear layers that the checkpoint holds packed by empty modules of the right shapes."""
        if not files:
            raise FormatError("a compressed checkpoint is read from .safetensors files, but none were given")
        entries = read_headers(files)
        install()
        unfuse_packed_experts(model, entries)
        put_packed_convolutions(model, entries)
        layers = linear_layers(model)
        packed, names = check_checkpoint(model, self.quantization_config, entries)
        for name, parts in packed.items():
            dtype = _stored_dtype(model, name, layers[name].weight.dtype)
            model.set_submodule(name, empty_packed_layer(layers[name], parts, dtype))
        # The zero-element `weight` entries are for readers without this package.
        sentinels = {*packed, *group_layers(entries)}
        model._keys_to_ignore_on_load_unexpected |= {rf"{re.escape(name)}\.{SENTINEL}$" for name in sentinels}
        self._dtypes = {name: _stored_dtype(model, name, p.dtype) for name, p in model.named_parameters()}
        self._directory = Path(files[0]).parent
        self._packed, self._prefix, self._names = sentinels, model.base_model_prefix, names

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module | None = None) -> list:
        """Keeps packed tensors from being fused or split, and own names as they are; 5.17 does not pass `model`."""
        if not self.pre_quantized:
            return weight_conversions
        if self._names.are_own:
            return exclude_all(weight_conversions)
        return exclude_packed(weight_conversions, self._packed, self._prefix)

    # -- after the weights are read

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from .heads import new_modules  # imports PreTrainedModel, whose module imports the quantizers

        self.new_modules = new_modules(model)
        if not self.pre_quantized:
            from ...compression.run import compress_in_memory

            config = self.quantization_config
            report = compress_in_memory(model, self._plan, config, self._samples)
            attach(model, config.stored(), report).hf_quantizer.new_modules = self.new_modules
            return model
        for name, parameter in model.named_parameters():
            # 5.17 gives tensors whose key was renamed the file's dtype.
            if parameter.is_floating_point() and not parameter.is_meta and parameter.dtype != self._dtypes[name]:
                parameter.data = parameter.data.to(self._dtypes[name])
        for module in packed_layers(model).values():
            module.requires_grad_(False)
            module.kernel = self.quantization_config.kernel
        link_shared_inputs(model)
        for thread in self._compiling:  # none works on while a CUDA graph may be captured
            thread.join()
        self._compiling = []  # models are copied with their quantizer, and threads cannot be
        model.sparselr_report = Report.load(self._directory)
        # A folder of this name would have been read instead of the Hub.
        self.hub_name = hub_id(model.config.name_or_path)
        return model

    # -- saving and the rest of the interface

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict, dict]:
        """The state dict with a zero-element `weight` per packed layer: stock transformers refuses such a file.

        transformers saves the returned one, and not the state dict given to `save_pretrained`, which is the only
        whole one of a sharded model.
        """
        state = dict(model.state_dict() if self.given_state is None else self.given_state)
        for name, module in packed_layers(model).items():
            # A slice of one element: empty tensors of their own would all look tied to one another.
            state[f"{name}.{SENTINEL}"] = torch.zeros(1, dtype=module.dtype)[:0]
        return state, {METADATA: room(state)}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        reject_adapters(model, "dequantize")
        if isinstance(dtype, str):  # saving a model leaves a name in its config
            dtype = getattr(torch, dtype)
        for name, module in packed_layers(model).items():
            model.set_submodule(name, module.to_dense().to(dtype).requires_grad_(True))
        fuse_experts(model)
        restore_convolutions(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        from .sharding import check_sharding

        check_sharding()  # Trainer asks for this property once its accelerator is set up
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: nn.Module, config: SparseLRConfig, report: Report) -> nn.Module:
    """Makes an in-memory compressed model save, push and report like a loaded one."""
    quantizer = SparseLRQuantizer(config, pre_quantized=True)
    install()
    for layer in packed_layers(model).values():
        layer.kernel = config.kernel
    link_shared_inputs(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    model.config._is_quantized = True
    model.sparselr_report = report
    model.name_or_path = None  # PEFT names the base of an adapter after it: not the dense model (see `hub`)
    model.add_model_tags(["sparselr", "compressed"])
    return model


def _stored_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which transformers loads a parameter: the skeleton's, unless the model keeps it in FP32."""
    kept = model._get_dtype_plan(torch.get_default_dtype())  # keys are globs, which match anywhere in a name
    keep = any(re.search(glob.replace("*", ".*"), name) for glob in kept)
    return torch.float32 if keep and dtype.is_floating_point else dtype


def _register() -> None:
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(SparseLRConfig)
    auto.register_quantizer(QUANT_METHOD)(SparseLRQuantizer)


_register()
