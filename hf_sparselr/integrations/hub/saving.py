"""Saving and publishing a compressed model: one transaction, with model card and report beside the checkpoint.

integrations/patches.py puts `save_pretrained` and `upload` around transformers' methods; format/README.md lists the
files that they write.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download

from ...compression.report import FILE_NAME, Report
from ...config.sparselr_config import SparseLRConfig
from ...format.checkpoint import read_headers
from ...format.seal import seal
from ...format.staging import Staging, stale, write_text
from ...nn.linear import packed_layers
from ..transformers.adapters import reject_adapters
from ..transformers.checks import changed_ranks, check_saved
from ..transformers.names import needs_own_names
from .model_card import README, base_licence, is_generated, licence_fields, licence_of, model_card, tags_of

__all__ = ["model_card", "save_pretrained", "upload", "write_extras"]

logger = logging.getLogger("hf_sparselr")


def write_extras(model: Any, directory: str | os.PathLike) -> None:
    """Writes `sparselr_report.json` and the model card (README.md) of a compressed model into a directory.

    A README.md that was not generated, or was edited since, stays and only gets the tags it lacks.

    Args:
        model: a compressed transformers model.
        directory: it exists, and holds the checkpoint.
    """
    _write(model, Path(directory), Path(directory) / README)


def _write(model: Any, directory: Path, readme: Path, repo_id: str | None = None, keep_card: bool = True) -> None:
    """Writes report and card into a directory.

    Args:
        readme: the card that is there already, if it exists.
        keep_card: a card that was not generated stays.
    """
    report = _report_of(model)
    if report is not None:
        report.save(directory)
    try:
        old = ModelCard.load(readme) if readme.is_file() else None
    except Exception as error:
        logger.warning("%s cannot be read and stays as it is: %r", readme, error)
        return
    config = model.hf_quantizer.quantization_config
    # Without a report a new card would say less than the one that is there.
    if old is not None and keep_card and (report is None or not is_generated(old)):
        if _add_tags(old, tags_of(config)) or readme.parent != directory:
            write_text(directory / README, str(old))
        return
    architecture = (model.config.architectures or [type(model).__name__])[0]
    card = model_card(config, report, repo_id, _carried_licence(model, report, old), architecture)
    _add_tags(card, old.data.tags if old is not None else None)
    write_text(directory / README, str(card))


def _report_of(model: Any) -> Report | None:
    """The model's report; for one from the Hub, which transformers loads without it, the report beside it there."""
    report = getattr(model, "sparselr_report", None)
    name = model.hf_quantizer.hub_name
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
    found = base_licence(report) if report is not None else {}
    name = model.config.name_or_path
    if not found and (os.path.isdir(name or "") or name == model.hf_quantizer.hub_name):
        found = licence_of(name)
    return found or (licence_fields(old) if old is not None else {})


def _add_tags(card: ModelCard, tags: list[str] | None) -> bool:
    """Adds the tags that a card lacks; whether there were any."""
    present = card.data.tags or []
    missing = [tag for tag in tags or [] if tag not in present]
    card.data.tags = [*present, *missing] or None
    return bool(missing)


# -- saving


def _is_ours(model: Any) -> bool:
    """A compressed model that is about to be saved whole: with adapters, transformers saves only those."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return isinstance(config, SparseLRConfig) and not getattr(model, "_hf_peft_config_loaded", False)


@contextlib.contextmanager
def _passing_on(model: Any, state_dict: dict | None, staging: Staging | None = None) -> Iterator[None]:
    """Shows our quantizer the arguments of `save_pretrained` that transformers does not pass on."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not hasattr(quantizer, "given_state"):  # another method's
        yield
        return
    quantizer.given_state, quantizer.staging = state_dict, staging
    try:
        yield
    finally:
        quantizer.given_state = quantizer.staging = None


def save_pretrained(
    call: Callable[..., Any],
    self: Any,
    save_directory: str | os.PathLike,
    is_main_process: bool,
    state_dict: dict | None,
    push_to_hub: bool,
    variant: str | None,
    kwargs: dict[str, Any],
    distributed_checkpoint: bool = False,
) -> Any:
    """Around `PreTrainedModel.save_pretrained`: a compressed model is saved as a transaction.

    Raises:
        ValueError: before anything is written, naming the obstacle.
        FormatError: the files that were written do not hold the model; nothing was changed.
    """
    if not _is_ours(self) or not self.should_save_on_this_rank(is_main_process):
        with _passing_on(self, state_dict):
            return call()
    directory = Path(save_directory)
    if directory.is_file():
        raise ValueError(f"save_directory={str(directory)!r} is a file: expected a folder")
    if distributed_checkpoint:
        raise ValueError("distributed_checkpoint=True is not supported for sparselr models: leave it out")
    reject_adapters(self, "save")
    changes = {"save_original_format": False} if needs_own_names(self, packed_layers(self)) else {}
    if push_to_hub:
        changes["repo_id"] = kwargs.get("repo_id", directory.name)
    with Staging(directory, variant) as staging, _passing_on(self, state_dict, staging):
        result = call(save_directory=str(staging.folder), **changes)
        if not staging.committed:  # else an upload has done it
            _commit(self, staging)
    if self.name_or_path is None:  # compressed in memory; adapters name their base after it
        self.name_or_path = str(directory)
    return result


def upload(
    call: Callable[..., Any],
    self: Any,
    working_dir: str | os.PathLike,
    repo_id: str,
    commit_message: str | None,
    token: bool | str | None,
    create_pr: bool,
    revision: str | None,
    commit_description: str | None,
) -> Any:
    """Around `PreTrainedModel._upload_modified_files`: report and card of a compressed model, and all in one commit.

    The commit also removes the repository's weight files that are not among the new ones.
    """
    if not _is_ours(self):
        return call()
    # A README.md here that the Hub does not have yet is transformers' default.
    keep = HfApi().file_exists(repo_id, README, token=token)
    staging = self.hf_quantizer.staging
    if staging is not None:  # within save_pretrained(push_to_hub=True)
        names, directory, variant = _commit(self, staging, repo_id, keep), staging.directory, staging.variant
    else:
        directory, variant = Path(working_dir), None
        _write(self, directory, directory / README, repo_id, keep_card=keep)
        names = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    api = HfApi(token=token)
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    present = api.list_repo_files(repo_id, revision=revision)
    operations = [CommitOperationAdd(Path(name).as_posix(), directory / name) for name in sorted(names)]
    operations += [CommitOperationDelete(name) for name in stale(present, names, variant)]
    result = api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        create_pr=create_pr,
        revision=revision,
    )
    self.name_or_path = self.hf_quantizer.hub_name = repo_id
    return result


def _commit(model: Any, staging: Staging, repo_id: str | None = None, keep_card: bool = True) -> list[str]:
    """Completes, checks and seals the files of a save, and moves them into place; their names."""
    uploaded = staging.folder / README  # transformers puts the Hub's card there, or its default
    own = staging.directory / README
    _write(model, staging.folder, uploaded if repo_id and keep_card else own, repo_id)
    files = sorted(map(str, staging.folder.glob("*.safetensors")))
    config = model.hf_quantizer.quantization_config
    stored = check_saved(model, config, read_headers(files))
    ranks = changed_ranks(config, packed_layers(model))
    config.save_id = seal(staging.folder, files, {stored[name]: rank for name, rank in ranks.items()})
    return staging.commit()
