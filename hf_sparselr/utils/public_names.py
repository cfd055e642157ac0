"""Names of models and data that may be published: Hub names, never paths."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id

_CONFIG_NAME = re.compile(r"[\w.-]+")


def hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id; None for a path."""
    if not name or not isinstance(name, str) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def loaded_from_hub(config: Any) -> str | None:
    """The Hub id that a model was loaded from, or None.

    Its name alone may be a path of another folder, or made up. So a snapshot of it must be in the Hub's cache.
    """
    name = hub_id(config.name_or_path)
    if name is None:
        return None
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    return name if any(snapshots.glob("*/config.json")) else None


def public_source(source: Any) -> str:
    """A calibration source for others to read: a keyword or a Hub data set as it is; "custom" for files and data."""
    if not isinstance(source, str) or source.startswith("file:"):
        return "custom"
    name, colon, config = source.partition(":")
    if hub_id(name) and (not colon or _CONFIG_NAME.fullmatch(config)):
        return source
    return "custom"
