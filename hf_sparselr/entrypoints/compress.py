"""`hf_sparselr.compress`: compress a model in memory or by name, and write the packed checkpoint."""

import os
from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedModel

from ..compression.distributed import check_placement, joined
from ..compression.plan import plan_layers
from ..compression.run import compress_in_memory
from ..compression.samples import Samples
from ..config.sparselr_config import SparseLRConfig
from ..data.origin import Origin
from ..integrations.transformers.quantizer import attach
from ..utils.modules import check_device, restored_on_error
from ..utils.world import ALONE, World
from .dense_model import dense_skeleton
from .output import check_folder, check_output, save


def compress(
    model: str | os.PathLike | PreTrainedModel,
    config: SparseLRConfig,
    output_dir: str | os.PathLike | None = None,
    distributed: bool = False,
    **load_kwargs: Any,
) -> PreTrainedModel:
    """Compresses a model; the same as `from_pretrained(..., quantization_config=config)`, offline.

    Everything that can be wrong with the config, the layers, the calibration data and the output folder is found before
    weights are read. A model given as an object is changed in place, and left as it was if the run fails.

    Args:
        model: a Hub name, a directory, or a dense model in memory (CPU or GPU; blocks are worked on one at a time on
            `config.device`).
        output_dir: where to write the packed checkpoint, with tokenizer or processor, chat template, generation
            config, report and model card.
        distributed: share the work with the other processes of a launcher (torchrun, accelerate launch), each on its
            own GPU. All of them call this with the same arguments, and get the same model; the first one writes it.
        load_kwargs: for `from_pretrained` (dtype, revision, trust_remote_code, ...), when `model` is a name. Config,
            tokenizer and processor are loaded with those that concern them.

    Returns:
        The compressed model, in eval mode as `from_pretrained` returns one; `model.sparselr_report` is the
        report of the run.

    Raises:
        TypeError, ValueError, OSError: naming the field, layer or data set, and what is allowed.
    """
    if not isinstance(config, SparseLRConfig):
        raise TypeError(f"config={config!r}: expected a hf_sparselr.SparseLRConfig")
    if output_dir is not None:
        check_folder(output_dir)
    check_device(config.device)
    with joined(config.device) if distributed else nullcontext(ALONE) as world:
        return _compress(model, config, output_dir, world, load_kwargs)


def _compress(
    model: str | os.PathLike | PreTrainedModel,
    config: SparseLRConfig,
    output_dir: str | os.PathLike | None,
    world: World,
    load_kwargs: dict[str, Any],
) -> PreTrainedModel:
    given = model if isinstance(model, PreTrainedModel) else None
    if given is not None:
        _check_given(given, load_kwargs)
        check_placement(given, world)
        origin, skeleton = Origin.of_model(given), given
    else:
        origin = Origin.of_name(_name(model), load_kwargs)
        cls, skeleton = dense_skeleton(origin, load_kwargs.get("dtype", "auto"))
    plan = plan_layers(skeleton, config)
    processors = check_output(output_dir, skeleton, plan, origin, config.tokenizer) if output_dir is not None else []
    samples = Samples.load(skeleton, config, origin)
    dense = given if given is not None else cls.from_pretrained(origin.name, **load_kwargs)
    # Nobody else has a model that was loaded here.
    with restored_on_error(given, given.config) if given is not None else nullcontext():
        attach(dense, config.stored(), compress_in_memory(dense, plan, config, samples, world=world))
    if output_dir is not None:
        if world.first:
            save(dense, output_dir, processors)
        world.wait()
    return dense.eval()


def _name(model: Any) -> str:
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a transformers model, the name of one, or its directory"
        )
    return os.fspath(model)


def _check_given(model: PreTrainedModel, load_kwargs: dict[str, Any]) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        raise ValueError(
            f"model={model.config.name_or_path!r} is already quantised ({quantizer.quantization_config.quant_method})"
        )
    if load_kwargs:
        raise TypeError(f"{next(iter(load_kwargs))}: expected a model by name, as it is for from_pretrained")
