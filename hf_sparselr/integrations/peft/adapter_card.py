"""The card beside an adapter. It names the compressed model, and the package that opens it."""

import os
from collections.abc import Callable
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from ...nn.linear import SparseLRLinear
from ..hub.model_card import README

_TAG = "sparselr"
_BASE_TAG = "base_model:adapter:"


def complete_card(call: Callable[[], None], self: PeftModel, output_dir: str) -> None:
    """Around `PeftModel.create_or_update_model_card`: the card names the compressed base and this package."""
    call()
    if _is_ours(self):
        _complete(self, os.path.join(output_dir, README))


def complete_before_upload(self: PeftModel, working_dir: str) -> None:
    """Before `PeftModel._upload_modified_files`: PEFT's card in the place of transformers' default."""
    if _is_ours(self):
        self.create_or_update_model_card(working_dir)


def _is_ours(model: PeftModel) -> bool:
    return any(isinstance(module, SparseLRLinear) for module in model.modules())


def _complete(model: PeftModel, path: str) -> None:
    # As in the adapter's config; PEFT's card has the name in the model's config, which may be the dense model's.
    base = _published_base(model)
    card = ModelCard.load(path)
    card.data.base_model = base
    tags = {tag for tag in card.data.tags or [] if not tag.startswith(_BASE_TAG)}
    card.data.tags = sorted({*tags, _TAG, *([f"{_BASE_TAG}{base}"] if base else [])})
    if "hf_sparselr" not in card.text:
        card.text = f"\n{_note(base)}\n\n{card.text.lstrip()}"
    card.save(path)


def _published_base(model: PeftModel) -> str | None:
    """The base's name, if it was loaded from the Hub or pushed there; a path stays private."""
    base: Any = model.get_base_model()
    name: str | None = model.active_peft_config.base_model_name_or_path or base.name_or_path
    return name if name == getattr(getattr(base, "hf_quantizer", None), "hub_name", None) else None


def _note(base: str | None) -> str:
    name = f"[{base}](https://huggingface.co/{base})" if base else "a compressed model"
    return (
        f"An adapter for {name}, whose weight matrices are S + B A with a packed sparse S and low-rank factors B, A. "
        "The base only opens with the `hf_sparselr` package: `pip install hf_sparselr`."
    )
