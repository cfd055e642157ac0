"""Which layers of a checkpoint are packed, as its config.json says, and whether its files hold them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...format.checkpoint import (
    FORMAT_VERSION,
    PACKED_LAYERS,
    SENTINEL,
    FormatError,
    group_layers,
    read_headers,
)
from ...format.layer_names import expand_names
from ...format.seal import SAVE_ID, check_seal, read_seal


class PackedNames:
    """The names of a checkpoint's packed layers.

    Args:
        config: the `quantization_config` of its config.json.

    Raises:
        ValueError: a newer format, or a config that does not name its packed layers.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = config.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r}: this hf_sparselr serves checkpoints up to version {FORMAT_VERSION}; "
                "upgrade it to serve this one"
            )
        if config.get("low_rank", "flat") != "flat":
            raise ValueError(
                f"low_rank={config['low_rank']!r}: engines serve flat low-rank parts only; serve this model with "
                "transformers, or compress it with low_rank='flat'"
            )
        patterns = config.get(PACKED_LAYERS)
        if not isinstance(patterns, (list, tuple)) or not patterns:
            raise ValueError(
                f"{PACKED_LAYERS}={patterns!r}: expected the names of the packed layers; load the model in "
                "transformers and save it again with this version of hf_sparselr"
            )
        self.save_id = config.get(SAVE_ID)
        self.stored = tuple(expand_names(patterns))
        self.names = frozenset(self.stored)

    def rename(self, rename: Callable[[list[str]], Iterable[str]]) -> None:
        """Adds the names that an engine's model has for the layers."""
        self.names |= frozenset(rename(list(self.stored)))

    def packed(self, prefix: str, merged: Mapping[str, Sequence[str]]) -> list[str]:
        """Which packed layers stand behind an engine's linear layer.

        Args:
            prefix: the engine's name of the layer.
            merged: the engine's merged layers by their last component: {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
        """
        parent, _, leaf = prefix.rpartition(".")
        # The merged layer itself, where the model's own files hold it merged.
        leaves = dict.fromkeys((leaf, *merged.get(leaf, ())))
        sources = [f"{parent}.{source}" if parent else source for source in leaves]
        return [source for source in sources if self._has(source)]

    def _has(self, name: str) -> bool:
        """Checkpoints of a model without its head have shorter names."""
        parts = name.split(".")
        return any(".".join(parts[start:]) in self.names for start in range(len(parts)))

    def refuse_below(self, prefix: str, kind: str) -> None:
        """Raises ValueError if the layer, which is not linear, or one below it is packed."""
        if not prefix:
            return
        below = [name for name in self.names if name == prefix or name.startswith(f"{prefix}.")]
        if below:
            raise ValueError(
                f"{min(below)} is packed, but is part of a {kind} here, which this plugin cannot serve packed: serve "
                f"the dense model instead, AutoModelForCausalLM.from_pretrained(...).dequantize().save_pretrained(...)"
            )

    def check_files(self, directory: Path) -> None:
        """Compares the names with the headers of the .safetensors files in a directory.

        Raises:
            FormatError: a truncated file, files of different saves, a packed layer that is missing or incomplete.
        """
        files = [str(file) for file in sorted(directory.glob("*.safetensors"))]
        entries = read_headers(files)
        check_seal(entries, {file: read_seal(file) for file in files}, self.save_id)
        layers = group_layers(entries)
        for name in self.stored:
            parts = layers.get(name, {})
            missing = [part for part in ("mask", "values", SENTINEL) if part not in parts]
            missing += [part for part, other in (("A", "B"), ("B", "A")) if other in parts and part not in parts]
            if missing:
                raise FormatError(f"{directory}: tensor {name}.{missing[0]} is missing")
