"""`hf_sparselr.compress`: compress a model in memory or by name, and write the packed checkpoint."""

import os
from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedModel

from .. import __version__
from ..compression.block_source import BlockSource, StreamedBlocks
from ..compression.distributed import check_placement, joined
from ..compression.plan import plan_layers
from ..compression.run import compress_in_memory
from ..compression.run_folder import RunFolder
from ..compression.samples import Samples
from ..config.sparselr_config import SparseLRConfig
from ..data.origin import Origin
from ..integrations.transformers.lazy_loading import checkpoint_files, load_without_blocks
from ..integrations.transformers.quantizer import attach
from ..utils import fingerprint
from ..utils.modules import check_device, restored_on_error
from ..utils.world import ALONE, World
from .dense_model import dense_skeleton
from .memory_needs import tell_distillation_memory
from .output import check_folder, check_output, check_unused, save
from .streaming import are_read_by_block, is_streamed


def compress(
    model: str | os.PathLike | PreTrainedModel,
    config: SparseLRConfig,
    output_dir: str | os.PathLike | None = None,
    distributed: bool = False,
    *,
    stream: bool | str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
    **load_kwargs: Any,
) -> PreTrainedModel:
    """Compresses a model; the same as `from_pretrained(..., quantization_config=config)`, offline.

    Everything that can be wrong with the config, the layers, the calibration data and the output folder is found before
    weights are read. A model given as an object is changed in place, and left as it was if the run fails.

    With `output_dir`, a run that was stopped goes on after its last finished block when it is started again with the
    same arguments. Until it is complete, the folder holds no checkpoint.

    Args:
        model: a Hub name, a directory, or a dense model in memory (CPU or GPU; blocks are worked on one at a time on
            `config.device`).
        output_dir: where to write the packed checkpoint, with tokenizer or processor, chat template, generation
            config, report and model card.
        distributed: share the work with the other processes of a launcher (torchrun, accelerate launch), each on its
            own GPU. All of them call this with the same arguments, and get the same model; the first one writes it.
        stream: True reads one block at a time from the model's safetensors files, and writes it before the next. So
            the model need not fit into memory. "auto" does so where the model would take more than half of the free
            memory and nothing stands against it. The files are the same to the byte, but for the times and the GPU
            memory in report and model card.
        overwrite: replace a checkpoint in `output_dir`, or an unfinished run with other arguments.
        max_shard_size: of the files with the weights, as for `save_pretrained`.
        load_kwargs: for `from_pretrained` (dtype, revision, trust_remote_code, ...), when `model` is a name. Config,
            tokenizer and processor are loaded with those that concern them.

    Returns:
        The compressed model, in eval mode as `from_pretrained` returns one; `model.sparselr_report` is the
        report of the run. After streaming, its weights are pages of the files in `output_dir`.

    Raises:
        TypeError, ValueError, OSError: naming the field, layer or data set, and what is allowed.
    """
    if not isinstance(config, SparseLRConfig):
        raise TypeError(f"config={config!r}: expected a hf_sparselr.SparseLRConfig")
    if output_dir is not None:
        check_folder(output_dir)
        check_unused(output_dir, overwrite)
    check_device(config.device)
    with joined(config.device) if distributed else nullcontext(ALONE) as world:
        return _compress(model, config, output_dir, world, stream, overwrite, max_shard_size, load_kwargs)


def _compress(
    model: str | os.PathLike | PreTrainedModel,
    config: SparseLRConfig,
    output_dir: str | os.PathLike | None,
    world: World,
    stream: bool | str,
    overwrite: bool,
    max_shard_size: int | str,
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
    streamed = is_streamed(stream, given, skeleton, plan, config, output_dir, load_kwargs, world)
    processors = []
    if output_dir is not None:
        processors = check_output(output_dir, skeleton, plan, origin, config.tokenizer, keeps_blocks=True)
    samples = Samples.load(skeleton, config, origin)
    tell_distillation_memory(skeleton, config)
    if output_dir is None:
        dense = given if given is not None else cls.from_pretrained(origin.name, **load_kwargs)
        with _restored(given):
            attach(dense, config.stored(), compress_in_memory(dense, plan, config, samples, world=world))
        return dense.eval()
    files = checkpoint_files(type(skeleton), origin.name, load_kwargs) if given is None else None
    if streamed and files:
        streamed = are_read_by_block(files, stream)
    with RunFolder(output_dir, _identity(skeleton, config, samples, files), overwrite, world) as folder:
        source: BlockSource | None = None
        if streamed:
            dense, read = load_without_blocks(type(skeleton), origin.name, load_kwargs)
            source = StreamedBlocks(dense, read, folder.file)
        else:
            dense = given if given is not None else cls.from_pretrained(origin.name, **load_kwargs)
        with _restored(given):
            report = compress_in_memory(dense, plan, config, samples, source=source, folder=folder, world=world)
            attach(dense, config.stored(), report)
        if world.first:
            save(dense, output_dir, processors, source and source.state_dict(), max_shard_size)
        world.wait()
    if streamed:
        dense = type(skeleton).from_pretrained(output_dir, **_trust(load_kwargs))
        dense.sparselr_report = report
    return dense.eval()


def _restored(given: PreTrainedModel | None) -> Any:
    """Nobody else has a model that was loaded here."""
    return restored_on_error(given, given.config) if given is not None else nullcontext()


def _identity(
    skeleton: PreTrainedModel, config: SparseLRConfig, samples: Samples, files: list[str] | None
) -> dict[str, Any]:
    """Everything that decides about the result, for the manifest of the run."""
    data = samples.loaded or []
    tensors = {f"{number}.{key}": value for number, sample in enumerate(data) for key, value in sample.items()}
    weights = fingerprint.of_files(files) if files else fingerprint.of_tensors(skeleton.state_dict())
    return {
        "package": __version__,
        "model": {"class": type(skeleton).__name__, "dtype": str(skeleton.dtype), "weights": weights},
        "calibration": fingerprint.of_tensors(tensors, every=True),
        "config": config.to_dict(),
    }


def _trust(load_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: load_kwargs[key] for key in ("trust_remote_code",) if key in load_kwargs}


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
