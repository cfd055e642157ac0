"""What may be published of where models and data came from: Hub names, never paths."""

import os
import re
from typing import Any

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
    """The Hub id that a model's config was loaded from, or None: a name alone may be a path, or made up."""
    return hub_id(config.name_or_path) if getattr(config, "_commit_hash", None) else None


def public_source(source: Any) -> str:
    """A calibration source for others to read: a keyword or a Hub data set as it is; "custom" for files and data."""
    if not isinstance(source, str) or source.startswith("file:"):
        return "custom"
    name, colon, config = source.partition(":")
    if hub_id(name) and (not colon or _CONFIG_NAME.fullmatch(config)):
        return source
    return "custom"
