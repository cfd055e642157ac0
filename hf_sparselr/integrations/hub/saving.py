"""Model card and report beside a checkpoint, on disk and on the Hub.

`save_pretrained` and `push_to_hub` of a compressed model write both (see `integrations.patches`).
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download

from ...compression.report import FILE_NAME, Report
from ...config.sparselr_config import SparseLRConfig
from .model_card import README, hub_id, is_generated, licence_fields, licence_of, model_card, tags_of

__all__ = ["complete_before_upload", "model_card", "save_pretrained", "write_extras"]

logger = logging.getLogger("hf_sparselr")


def write_extras(model: Any, directory: str | os.PathLike) -> None:
    """Writes `sparselr_report.json` and the model card (README.md) of a compressed model into a directory.

    A README.md that was not generated, or was edited since, stays and only gets the tags it lacks.

    Args:
        model: a compressed transformers model.
        directory: it exists, and holds the checkpoint.
    """
    _write(model, Path(directory))


def _write(model: Any, directory: Path, repo_id: str | None = None, keep_card: bool = True) -> None:
    report = _report_of(model)
    if report is not None:
        dataclasses.replace(report, base_model=hub_id(report.base_model)).save(directory)
    readme = directory / README
    try:
        old = ModelCard.load(readme) if readme.is_file() else None
    except Exception as error:
        logger.warning("%s cannot be read and stays as it is: %r", readme, error)
        return
    config = model.hf_quantizer.quantization_config
    # Without a report a new card would say less than the one that is there.
    if old is not None and keep_card and (report is None or not is_generated(old)):
        if _add_tags(old, tags_of(config)):
            old.save(readme)
        return
    architecture = (model.config.architectures or [type(model).__name__])[0]
    card = model_card(config, report, repo_id, _carried_licence(model, report, old), architecture)
    _add_tags(card, old.data.tags if old is not None else None)
    card.save(readme)


def _report_of(model: Any) -> Report | None:
    """The model's report; for one from the Hub, which transformers loads without it, the report beside it there."""
    report = getattr(model, "sparselr_report", None)
    name = hub_id(model.config.name_or_path)
    snapshot = getattr(model.hf_quantizer, "_directory", None)
    if report is not None or name is None or snapshot is None:
        return report
    try:
        path = hf_hub_download(name, FILE_NAME, revision=snapshot.name)
        return Report.load(Path(path).parent)
    except Exception as error:  # as for the licence: never a reason not to save
        logger.debug("no report from %s: %r", name, error)
        return None


def _carried_licence(model: Any, report: Report | None, old: ModelCard | None) -> dict[str, str]:
    """From the base model, else from where the compressed model was loaded, else from the card it replaces."""
    base = report.base_model if report is not None else None
    found = licence_of(base) or licence_of(model.config.name_or_path)
    return found or (licence_fields(old) if old is not None else {})


def _add_tags(card: ModelCard, tags: list[str] | None) -> bool:
    """Adds the tags that a card lacks; whether there were any."""
    present = card.data.tags or []
    missing = [tag for tag in tags or [] if tag not in present]
    card.data.tags = [*present, *missing] or None
    return bool(missing)


def _is_ours(model: Any) -> bool:
    """A compressed model that is about to be saved whole: with adapters, transformers saves only those."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return isinstance(config, SparseLRConfig) and not getattr(model, "_hf_peft_config_loaded", False)


@contextlib.contextmanager
def _passing_on(model: Any, state_dict: dict | None):
    """Shows our quantizer the state dict given to `save_pretrained`; transformers does not pass it on."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not hasattr(quantizer, "given_state"):  # another method's
        yield
        return
    quantizer.given_state = state_dict
    try:
        yield
    finally:
        quantizer.given_state = None


def save_pretrained(
    call: Callable[[], Any],
    self: Any,
    save_directory: str | os.PathLike,
    is_main_process: bool,
    state_dict: dict | None,
    push_to_hub: bool,
) -> Any:
    """Around `PreTrainedModel.save_pretrained`: a compressed model gets its report and card."""
    with _passing_on(self, state_dict):
        result = call()
    if not _is_ours(self) or push_to_hub:  # an upload has written them
        return result
    if self.should_save_on_this_rank(is_main_process) and os.path.isdir(save_directory):
        write_extras(self, save_directory)
    if self.name_or_path is None:  # compressed in memory; adapters name their base after it
        self.name_or_path = str(save_directory)
    return result


def complete_before_upload(
    self: Any, working_dir: str | os.PathLike, repo_id: str, token: bool | str | None
) -> None:
    """Before `PreTrainedModel._upload_modified_files`: the report and card of a compressed model."""
    if not _is_ours(self):
        return
    # A README.md here that the Hub does not have yet is transformers' default.
    keep = HfApi().file_exists(repo_id, README, token=token)
    _write(self, Path(working_dir), repo_id, keep_card=keep)
    self.name_or_path = repo_id
