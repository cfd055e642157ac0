"""Every function of another library that this package wraps, and why. Imports only the standard library."""

from .patching import Patch, apply

PATCHES: dict[str, tuple[Patch, ...]] = {
    # by the module of the host after whose import they are applied
    "transformers.quantizers": (
        # A config passed for a compressed checkpoint: transformers ignores most of it, and says so wrongly.
        Patch(
            "transformers.quantizers.auto:AutoHfQuantizer.merge_quantization_configs",
            "transformers.stored_config:merge_configs",
            lost="a quantization_config passed for a compressed checkpoint is ignored, its kernel too",
            around=True,
        ),
    ),
    "transformers.trainer_utils": (
        # Trainer's refusal of a model without anything to train knows adapters only.
        Patch(
            "transformers.trainer_utils:validate_quantization_for_training",
            "transformers.training:check_trainable",
            lost="Trainer's refusal of a compressed model does not name lora_config and train_mode",
        ),
    ),
    "transformers.modeling_utils": (
        # transformers writes into the folder, file by file, has no hook for files beside a checkpoint, and no way to
        # hand a quantizer `state_dict=`.
        Patch(
            "transformers.modeling_utils:PreTrainedModel.save_pretrained",
            "hub.saving:save_pretrained",
            lost="compressed models are saved file by file, without seal, report and model card, and state_dict= is "
            "ignored",
            around=True,
        ),
        # push_to_hub puts transformers' default card over ours between saving and uploading, and leaves weight files
        # of an earlier push in the repository, which would be read instead.
        Patch(
            "transformers.modeling_utils:PreTrainedModel._upload_modified_files",
            "hub.saving:upload",
            lost="compressed models are pushed with the default model card and without their report, and old weight "
            "files stay in the repository",
            around=True,
        ),
        # transformers' hot swap is a load_adapter under a name in use, which looks at no config.
        Patch(
            "transformers.integrations.peft:PeftAdapterMixin.load_adapter",
            "peft.guards:check_reload",
            lost="hot-swapping an adapter that replaces factors for one that adds to them goes unnoticed",
        ),
    ),
    "peft": (
        # Every adapter of every method passes here while the model is still unchanged. PEFT would give a packed
        # layer its own LoRA class, which merges into a dense copy and drops the result.
        Patch(
            "peft.tuners.tuners_utils:BaseTuner.inject_adapter",
            "peft.guards:check_injection",
            lost="adapters on compressed layers are not checked, and LoRA's do not merge",
        ),
        # In models with experts as 3-D parameters PEFT takes any layer whose name ends like an expert's for these.
        Patch(
            "peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers",
            "peft.targets:convert_config",
            lost="in models with experts, adapters may target these instead of the compressed layers they name",
            around=True,
        ),
        # PEFT mixes the factors of adapters without knowing that some hold the model's own.
        Patch(
            "peft.tuners.lora:LoraModel.add_weighted_adapter",
            "peft.guards:check_weighting",
            lost="mixing adapters that replace factors with others goes unnoticed",
        ),
        # X-LoRA adds the outputs of its experts.
        Patch(
            "peft.tuners.xlora:XLoraModel._maybe_freeze_all_adapters",
            "peft.guards:check_experts",
            lost="X-LoRA over adapters that replace factors counts these twice",
        ),
        # The values of another adapter are copied in; layers that it lacks become zero.
        Patch(
            "peft.utils.hotswap:hotswap_adapter_from_state_dict",
            "peft.guards:check_hotswap",
            lost="hot-swapping an adapter that replaces factors for another kind goes unnoticed",
        ),
        # The function compares an adapter with the weight that it adds to.
        Patch(
            "peft.tuners.lora.intruders:reduce_intruder_dimension",
            "peft.guards:check_intruders",
            lost="reducing the intruder dimensions of an adapter that replaces factors goes unnoticed",
        ),
        # The function knows methods by name, and casts the models of others to FP32.
        Patch(
            "peft.utils.other:prepare_model_for_kbit_training",
            "peft.training:prepare_for_kbit_training",
            lost="prepare_model_for_kbit_training casts compressed layers to FP32",
            around=True,
        ),
        # PEFT's card names no base and no way to open it.
        Patch(
            "peft:PeftModel.create_or_update_model_card",
            "peft.adapter_card:complete_card",
            lost="adapter cards do not say which compressed model they belong to",
            around=True,
        ),
        # push_to_hub puts transformers' default card over PEFT's between saving and uploading.
        Patch(
            "peft:PeftModel._upload_modified_files",
            "peft.adapter_card:complete_before_upload",
            lost="adapters are pushed with the default model card",
        ),
    ),
}


def apply_all(host: str) -> None:
    """Applies the patches of a host that has been imported."""
    for patch in PATCHES.get(host, ()):
        apply(patch)
