"""Inputs for any model: shapes come from its config and from the signature of its forward method.

No model type is named. For every argument there are candidates; those with which the dense model runs are taken.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as tf

from .tiny_configs import SPECIAL

LENGTH = 32  # tokens
MOST = 80  # combinations tried a model

Maker = Callable[[torch.Generator], torch.Tensor]


def find_inputs(model: tf.PreTrainedModel, kinds: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """A function that draws one sample of inputs from a seed.

    Args:
        kinds: how many kinds of input (text, images, sound) there are to be.

    Raises:
        RuntimeError: no combination of inputs runs; holds the error of the first.
    """
    first = None
    rich = (makers for makers in _combinations(model) if _kinds(makers) == kinds)
    for makers in itertools.islice(rich, MOST):
        try:
            draw = _drawer(model, makers)
            _run(model, draw(0))
            return draw
        except Exception as error:  # any model may fail in its own way
            first = first or error
    raise RuntimeError(f"no inputs found: {type(first).__name__}: {first}") from first


def forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    torch.manual_seed(0)  # some models draw noise
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    without_cache = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    return model(**inputs, **without_cache)


def tensors(output: Any) -> list[torch.Tensor]:
    """All floating-point tensors in an output, however nested."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [found for item in output for found in tensors(item)]
    return []


@torch.no_grad()
def _run(model: tf.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    found = tensors(forward(model, inputs))
    if not found:
        raise RuntimeError("the output holds no floating-point tensor")
    if not all(item.isfinite().any() for item in found[:1]):
        raise RuntimeError("the output is not finite")


def _configs(config: tf.PreTrainedConfig) -> Iterator[tf.PreTrainedConfig]:
    """A config and those nested in it, outer ones first."""
    yield config
    for value in vars(config).values():
        if isinstance(value, tf.PreTrainedConfig):
            yield from _configs(value)


def _value(config: tf.PreTrainedConfig, names: tuple[str, ...], default: int) -> int:
    for inner in _configs(config):
        for name in names:
            value = getattr(inner, name, None)
            value = value[-1] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _normal(*shape: int) -> Maker:
    return lambda generator: torch.randn(shape, generator=generator)


def _ids(length: int, high: int, *channels: int) -> Maker:
    return lambda generator: torch.randint(3, high, (1, length, *channels), generator=generator)


def _constant(tensor: torch.Tensor) -> Maker:
    return lambda generator: tensor.clone()


def _candidates(model: tf.PreTrainedModel) -> dict[str, list[Maker]]:
    """{argument of forward: makers of a value, likely ones first}."""
    config = model.config
    high = min(_value(config, ("vocab_size",), SPECIAL), SPECIAL)
    size = _value(config, ("image_size", "img_size"), 64)
    channels = _value(config, ("num_channels", "in_channels", "in_chans"), 3)
    patch = _value(config, ("patch_size", "spatial_patch_size"), 8)
    merge = _value(config, ("spatial_merge_size", "merge_size"), 2)
    depth = _value(config, ("temporal_patch_size",), 1)
    frames = _value(config, ("num_frames",), 2)
    mel = _value(config, ("num_mel_bins", "mel_dim", "feature_size", "input_feat_per_channel", "n_mels"), 16)
    times = 2 * _value(config, ("max_source_positions", "max_length"), 32)
    side = 2 * merge
    sizes = dict.fromkeys((size, 64, 224))
    images = [_normal(1, channels, s, s) for s in sizes]
    flat = [_normal(side * side, channels * depth * patch * patch)]
    tiles = [_normal(1, n, channels, s, s) for s in (size, 64) for n in (1, 2, frames)]
    patches = [_normal(1, side * side, *size) for size in ((channels * patch * patch,), (channels, patch, patch))]
    spectra = [shape for t in (times, 128) for shape in (_normal(1, mel, t), _normal(1, t, mel))]
    waves = [_normal(1, 4000), _normal(1, 1, 4000), _normal(1, 16000)]
    grid = torch.tensor([[1, side, side]])
    boxes = torch.tensor([10, 10, 60, 60]).expand(1, LENGTH, 4)
    ids = _ids(LENGTH, high)
    return {
        "input_ids": [ids],
        "decoder_input_ids": [
            ids,
            _ids(LENGTH, high, _value(config.get_text_config(decoder=True), ("num_channels",), 2)),
        ],
        "qformer_input_ids": [ids],
        "attention_mask": [_constant(torch.ones(1, LENGTH, dtype=torch.long))],
        "token_type_ids": [_constant(torch.zeros(1, LENGTH, dtype=torch.long))],
        "bbox": [_constant(boxes)],
        "pixel_values": [*images, *flat, *tiles, *patches],
        "pixel_values_videos": tiles,
        "pixel_values_images": images,
        "flattened_patches": [_normal(1, 16, 2 + channels * patch * patch)],
        "high_res_pixel_values": images,
        "image_position_ids": [_constant(torch.cartesian_prod(torch.arange(side), torch.arange(side))[None])],
        "image_grid_thw": [_constant(grid)],
        "grid_thw": [_constant(grid)],
        "image_grid_hw": [_constant(grid[:, 1:])],
        "image_grid_hws": [_constant(grid[:, 1:])],
        "image_merge_sizes": [_constant(torch.tensor([merge]))],
        "image_attention_mask": [_constant(torch.ones(1, LENGTH, 1, dtype=torch.long))],
        "image_sizes": [_constant(torch.tensor([[size, size]]))],
        "spatial_shapes": [_constant(torch.tensor([[side, side]]))],
        "pixel_attention_mask": [
            _constant(torch.ones(1, side * side, dtype=torch.long)),
            _constant(torch.ones(1, 1, size, size, dtype=torch.long)),
        ],
        "pixel_mask": [_constant(torch.ones(1, size, size, dtype=torch.long))],
        "input_features": [*spectra, *waves],
        "input_features_mask": [_constant(torch.ones(1, times, dtype=torch.long))],
        "feature_attention_mask": [_constant(torch.ones(1, times, dtype=torch.long))],
        "input_values": [*waves, *spectra],
        "padding_mask": [_constant(torch.ones(1, 4000, dtype=torch.long))],
    }


_TEXT = ("input_ids", "decoder_input_ids")
_IMAGE = ("pixel_values", "pixel_values_videos", "pixel_values_images", "flattened_patches")
_SOUND = ("input_features", "input_values")
_IMAGE_EXTRAS = (
    "image_grid_thw", "grid_thw", "image_grid_hw", "image_grid_hws", "image_sizes", "spatial_shapes",
    "image_attention_mask", "image_merge_sizes", "pixel_attention_mask", "pixel_mask",
    "high_res_pixel_values", "image_position_ids",
)  # fmt: skip
_SOUND_EXTRAS = ("input_features_mask", "feature_attention_mask", "padding_mask")


def _combinations(model: tf.PreTrainedModel) -> Iterator[dict[str, Maker]]:
    """Sets of arguments, those that use most of what the model takes first."""
    known, taken = _candidates(model), inspect.signature(model.forward).parameters
    required = [n for n, p in taken.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    text = [name for name in _TEXT if name in taken]
    image = [name for name in _IMAGE if name in taken or name == model.main_input_name][:1]
    sound = [name for name in _SOUND if name in taken or name == model.main_input_name][:1]
    image_extras = [name for name in _IMAGE_EXTRAS if name in taken]
    sound_extras = [name for name in _SOUND_EXTRAS if name in taken]
    rich = ["attention_mask", "bbox", "token_type_ids"]
    for kinds in (image + sound, image, sound, []):
        for words in dict.fromkeys((tuple(text), tuple(text[:1]), tuple(text[1:]), ())):
            extras = [image_extras * bool(set(image) & set(kinds)) + sound_extras * bool(set(sound) & set(kinds))]
            extras += [[]] if extras[0] else []
            for extra in extras:
                chosen = dict.fromkeys([*words, *kinds, *extra, *required])
                if not chosen or any(name not in known for name in chosen):
                    continue
                yield from _product(chosen, known)
                if words and (more := [name for name in rich if name in taken and name not in chosen]):
                    yield from _product([*chosen, *more], known)


def most_kinds(model: tf.PreTrainedModel) -> int:
    """How many of text, images and sound a model takes."""
    return _kinds(inspect.signature(model.forward).parameters)


def _kinds(names: Any) -> int:
    return sum(any(name in names for name in kind) for kind in (_TEXT, _IMAGE, _SOUND))


def _product(names: Any, known: dict[str, list[Maker]]) -> Iterator[dict[str, Maker]]:
    for makers in itertools.product(*(known[name] for name in names)):
        yield dict(zip(names, makers, strict=True))


def _drawer(model: tf.PreTrainedModel, makers: dict[str, Maker]) -> Callable[[int], dict[str, torch.Tensor]]:
    counts, end = _placeholders(model, makers), getattr(model.config, "eos_token_id", None)

    def draw(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs = {name: make(generator) for name, make in makers.items()}
        if isinstance(end, int) and end >= 0 and "input_ids" in inputs:
            inputs["input_ids"][:, -1] = end  # some classification heads read the last token
        return _with_placeholders(model, inputs, counts)

    return draw


def _with_placeholders(model: tf.PreTrainedModel, inputs: dict, counts: dict[int, int]) -> dict:
    """Writes the tokens that stand for images or sounds into the ids; the ids grow to hold them."""
    ids = inputs.get("input_ids")
    if ids is None or not counts:
        return inputs
    ids = torch.where(torch.isin(ids, torch.tensor(list(counts))), SPECIAL - 1, ids)
    runs = [torch.full((1, count), token) for token, count in counts.items()]
    inputs["input_ids"] = torch.cat([ids[:, :4], *runs, ids[:, 4:]], dim=1)
    for name in ("attention_mask", "token_type_ids"):
        if name in inputs:
            fill = torch.ones_like if name == "attention_mask" else torch.zeros_like
            inputs[name] = fill(inputs["input_ids"])
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = sum((inputs["input_ids"] == token).long() for token in counts)
    return inputs


def _placeholders(model: tf.PreTrainedModel, makers: dict[str, Maker]) -> dict[int, int]:
    """{token id that stands for an image or a sound: how many the features of one sample need}."""
    if "input_ids" not in makers:
        return {}
    counts, generator = {}, torch.Generator().manual_seed(0)
    inputs = {name: make(generator) for name, make in makers.items()}
    for kind, sources in (("image", _IMAGE), ("audio", _SOUND), ("video", ())):
        given = [name for name in sources if name in makers]
        token = _value(model.config, (f"{kind}_token_id", f"{kind}_token_index"), -1)
        method = _method(model, f"get_{kind}_features")
        if not given or token < 0 or method is None:
            continue
        taken = inspect.signature(method).parameters
        with torch.no_grad():
            features = method(**{name: value for name, value in inputs.items() if name in taken and name not in _TEXT})
        features = getattr(features, "pooler_output", features)
        width = _value(model.config.get_text_config(), ("hidden_size", "d_model", "n_embd"), 64)
        found = [item for item in tensors(features) if item.shape[-1] == width] or tensors(features)
        counts[token] = sum(item.numel() // item.shape[-1] for item in found)
    return counts


def _method(model: tf.PreTrainedModel, name: str) -> Callable | None:
    return getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)
