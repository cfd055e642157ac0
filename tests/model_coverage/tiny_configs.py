"""Shrinks the default config of any model type by the names and values of its fields.

No model type is named. A field whose value is a number, or a list of numbers, gets a small one by the first pattern
that its name matches; nested configs are shrunk alike. Fields that a config derives from others are left to it.
"""

import copy
import dataclasses
import re
from typing import Any

import transformers as tf

VOCAB = 128
SPECIAL = 100  # token ids from here on are special ones; inputs use the ids below
IMAGE = 32  # pixels


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One way to shrink: if a model cannot be built or run with it, the next one is tried."""

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    image: int = IMAGE
    derived: bool = False  # lists that the config derived are shrunk, too, and some fields without a value get one
    scaled: bool = False  # widths are divided by a common factor instead, which keeps their ratios

    expand: int = 1  # width of all heads together, in hidden sizes

    @property
    def head(self) -> int:
        return self.expand * self.hidden // self.heads


WAYS = (
    Sizes(),
    Sizes(kv_heads=4),
    Sizes(scaled=True),
    Sizes(layers=4),
    Sizes(image=64, kv_heads=4),
    Sizes(derived=True),
    Sizes(heads=8, kv_heads=8, expand=2),
    Sizes(layers=4, heads=8, kv_heads=8, expand=2, derived=True),
    Sizes(hidden=256, heads=2, kv_heads=1),
    Sizes(scaled=True, image=64, layers=4),
)


def rules(sizes: Sizes, pixels: bool = False) -> list[tuple[str, int | None]]:
    """Pairs (pattern of a field's name, largest value); None leaves the field alone.

    Args:
        pixels: windows are measured in pixels, not in patches.
    """
    return [
        (r"(attention|attn|relative|rel|key_value)_(buckets|bins|num_buckets)|sampling_rate|sample_rate", None),
        (r"vocab(ulary)?_size|codebook_size|num_embeddings|num_embeds|vocab_offset", VOCAB),
        (r"(max|n)_?(source|target)_positions|max_pos_emb", 32),
        (r"position_embeddings$|n_positions|n_ctx|context_length|max_length|max_seq_len", 128),
        (r"sliding_window|local_attention|attention_window|context_size|^(attention_)?chunk_size|block_size", 16),
        (r"image_size|img_size|crop_size|resolution$|^image_embedding_size", sizes.image),
        (r"^patch_size$|spatial_patch_size", 8),
        (r"window_size$", sizes.image if pixels else 2),
        (r"tokens_per_image", 4),
        (r"num_mel_bins|mel_dim|num_mels", 16),
        (r"(num|n)_(key_value|kv)_heads|^kv_n_heads|num_query_groups|num_kv|multi_query_group", sizes.kv_heads),
        (r"(top_?k|per_tok(en)?|moe_k)$", 2),
        (r"n_group$|topk_group|^num_expert_group", 1),
        (r"first_k_dense|num_dense_layers|moe_layer_start", 1),
        (r"(num|n)_.*shared_experts", 1),
        (r"experts$|expert_num$", 4),
        (r"num_filters|groups$", 8),
        (r"kpool$", 2),
        (r"per_block$|layers?$|^depth$|(num|n)_blocks?$|num_.*layers_|blocks_per|^num_layers|n_layers", sizes.layers),
        (r"^depths$|stage_numb_of_layers", 1),
        (r"(?<!d_)heads?$", sizes.heads),
        (r"qk_head_dim", 2 * sizes.head),
        (r"rope_head_dim|index_head_dim|^d_kv$|head_(dim|size)$|d_head$|^dim_head$|^rotary_dim$", sizes.head),
        (r"lora_rank|state_size|d_state|time_step_rank|_rank$", 32),
        (r"query_pre_attn_scalar", sizes.head),
        (r"attention_hidden_size", 2 * sizes.hidden),
        (r"intermediate|ffn|mlp_dim|mlp_hidden|^d_?ff$|feed_forward|d_inner|feedforward", 2 * sizes.hidden),
        (r"hidden|d_(model|latents)|embd$|emb(ed|edding)?_dim|embedding_size|^dim$|width", sizes.hidden),
        (r"proj.*_(dim|size)", sizes.hidden),
        (r"(conv|output|out|lru|d)_(dim|channels|width|size|hidden_size)|channels_list|channel_list", sizes.hidden),
        (r"_dim$|^dim", sizes.hidden),
    ]  # fmt: skip


_NEEDED = r"^num_key_value_heads$|^head_dim$|^image_token_(id|index)$"  # some defaults have none and cannot run


def tiny_config(
    cls: type[tf.PreTrainedConfig], sizes: Sizes, wanted: type[tf.PreTrainedConfig] | None = None
) -> tf.PreTrainedConfig:
    """A small config of a class. Raises what the class raises if it has no default, or refuses the small values.

    Args:
        wanted: the config class of the model; one nested in the config, if the config is none itself.
    """
    config = _shrunk(cls(), sizes, {})
    if wanted is None or isinstance(config, wanted):
        return config
    return next((inner for inner in vars(config).values() if isinstance(inner, wanted)), config)


def _shrunk(config: tf.PreTrainedConfig, sizes: Sizes, ids: dict[int, int]) -> tf.PreTrainedConfig:
    """Args: ids: {token id: its small one}, of the configs shrunk so far, to which new ones are added."""
    factor = _factor(config, sizes)
    fields = {field.name: field for field in dataclasses.fields(config)}
    values, layers = {}, getattr(config, "num_hidden_layers", None)
    for name, field in fields.items():
        if name.startswith("_") or name in ("id2label", "label2id", "problem_type", "dtype", "use_cache"):
            continue
        try:
            old = getattr(config, name, None)
        except RuntimeError:  # another value in every layer
            continue
        if isinstance(old, tf.PreTrainedConfig):
            values[name] = _shrunk(old, sizes, ids)
        elif old is None and sizes.derived and re.search(_NEEDED, name):
            special = "token" in name
            values[name] = VOCAB - 20 if special else _capped(name, VOCAB, sizes, factor)
        elif isinstance(old, dict) and old:
            values[name] = _sections(name, old, sizes)
        elif old is not None and (sizes.derived or _is_given(field, old)):
            values[name] = _small(name, old, sizes, factor, ids)
            if isinstance(old, list | tuple) and len(old) == layers > sizes.layers:  # one entry a layer
                values[name] = type(old)(values[name][: sizes.layers])
    if "vocab_size" in fields and vars(config).get("vocab_size") is None:
        values["vocab_size"] = VOCAB
    if "pad_token_id" in fields and values.get("pad_token_id") is None:
        values["pad_token_id"] = 0
    return type(config)(**values)


def _is_given(field: dataclasses.Field, value: Any) -> bool:
    """Whether a value is the field's own default and none that the config derived from other fields."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return True
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return default is not None or not isinstance(value, list | tuple | dict)


def _factor(config: tf.PreTrainedConfig, sizes: Sizes) -> int:
    widths = [
        max(value) if isinstance(value, list | tuple) else value
        for name in ("hidden_size", "d_model", "embed_dim", "hidden_dim", "hidden_sizes", "n_embd", "dim")
        if _numbers(value := getattr(config, name, None))
    ]
    factor = 1
    while widths and max(widths) // (2 * factor) >= sizes.hidden:
        factor *= 2
    return factor


def _numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_numbers(item) and not isinstance(item, list | tuple) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _small(name: str, value: Any, sizes: Sizes, factor: int, ids: dict[int, int]) -> Any:
    if name in ("backbone", "architecture") and value == "resnet50":  # of the timm library, which names sizes
        return "test_resnet"
    if isinstance(value, list | tuple):
        return _small_list(name, value, sizes, factor, ids)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.search(r"token_id|token_index|_tok_id|^(bos|eos|pad)_id", name):
        return value if value < SPECIAL else ids.setdefault(value, VOCAB - 1 - len(ids))
    if re.search(r"feature_layer|select_layer", name):
        return max(min(value, sizes.layers - 1), -sizes.layers)
    return _capped(name, value, sizes, factor)


def _small_list(name: str, value: list | tuple, sizes: Sizes, factor: int, ids: dict[int, int]) -> Any:
    if value and all(isinstance(item, str) for item in value):
        many = len(value) > sizes.layers and name.endswith(("types", "type", "pattern"))
        kinds = list(dict.fromkeys(value))  # the layers that stay are of as many kinds as possible
        return [*kinds, *value[len(kinds) :]][: sizes.layers] if many else value
    if re.search(r"ind(ex|ices|exes)|feature_layer|(?<!num)(?<!of)_layers$|attention_blocks|layers_block", name):
        kept = [item for item in value if isinstance(item, int) and -sizes.layers <= item < sizes.layers]
        return type(value)(kept or [sizes.layers - 1] * bool(value))
    if name.endswith("pinpoints"):  # sizes of images, in tiles
        return type(value)([[sizes.image, sizes.image]])
    if not _numbers(value):
        return value
    if name.endswith("heads"):  # widths of stages are powers of two times the first
        return type(value)(1 << (min(item, sizes.heads).bit_length() - 1) for item in value)
    small = [_small(name, item, sizes, factor, ids) for item in value]
    is_width = len(set(small)) < len(set(value)) and not re.search("depth|image_size|layers", name)
    if is_width and len(value) > 2:  # one width a stage: their ratios are kept
        top, shrink = max(value), 1
        while top // (2 * shrink) >= 2 * sizes.hidden:
            shrink *= 2
        small = [max(item // shrink, 1) for item in value]
    return type(value)(small)


def _capped(name: str, value: int, sizes: Sizes, factor: int) -> int:
    for pattern, limit in rules(sizes, pixels=value >= 64):
        if not re.search(pattern, name):
            continue
        if limit is None or value <= limit:
            return value
        widths = (sizes.hidden, 2 * sizes.hidden, sizes.head, 2 * sizes.head)
        if sizes.scaled and limit in widths and value % factor == 0:
            return max(value // factor, 8)
        return limit
    return value


def _sections(name: str, value: dict, sizes: Sizes) -> dict:
    """A dict without the entries of layers that are gone, and with rotary sections scaled to the small heads."""
    value = copy.deepcopy(value)
    if "layer" in name and all(str(key).isdecimal() for key in value):
        value = {key: item for key, item in value.items() if int(key) < sizes.layers}
    for inner in (value, *(item for item in value.values() if isinstance(item, dict))):
        section = inner.get("mrope_section")
        if section:
            half, parts = sizes.head // 2, len(section)
            inner["mrope_section"] = [half - (parts - 1) * (half // parts), *[half // parts] * (parts - 1)]
    return value
