"""Where a model comes from: its tokenizer and its processor are loaded from there."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Arguments of `from_pretrained` that say where files are and whether their code may run; all loaders take them.
_ARGUMENTS = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


@dataclass(frozen=True)
class Origin:
    """A name and how to load from it.

    Attributes:
        name: a Hub id, a directory, or "" for a model that was made in memory.
        arguments: for every `from_pretrained`, `revision` for example.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_name(cls, name: str, load_kwargs: Mapping[str, Any]) -> "Origin":
        """Of a model that is loaded by name with these arguments."""
        return cls(name, {key: load_kwargs[key] for key in _ARGUMENTS if key in load_kwargs})

    @classmethod
    def of_model(cls, model: Any, files: Sequence[str] | None = None) -> "Origin":
        """Of a model in memory, or of one that is being loaded from `files`.

        The files of a model from the Hub lie in a snapshot of a commit. If the model is made of code beside its
        checkpoint, the user trusted that code.
        """
        name = model.config.name_or_path or ""
        arguments: dict[str, Any] = {}
        if files:
            folder = Path(files[0]).absolute().parent
            commit, subfolder = _snapshot(folder)
            if os.path.isdir(name):
                commit, subfolder = None, os.path.relpath(folder, name)
            arguments = {"revision": commit} if commit else {}
            if subfolder not in ("", "."):
                arguments["subfolder"] = subfolder
        if type(model).__module__.startswith("transformers_modules."):
            arguments["trust_remote_code"] = True
        return cls(name, arguments)

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            OSError: it cannot be loaded; with the reason.
        """
        from transformers import AutoTokenizer

        if not self.name:
            raise OSError("tokenizer=None: the model was not loaded by name; pass its tokenizer")
        try:
            return AutoTokenizer.from_pretrained(self.name, **self.arguments)
        except Exception as error:  # loaders raise many types, ImportError of an optional package among them
            raise OSError(
                f"tokenizer=None: none can be loaded from {self.name!r} ({_reason(error)}); pass the model's tokenizer"
            ) from error

    def processor(self) -> Any:
        """The model's processor, or its tokenizer, image processor or feature extractor if it has only that.

        Raises:
            OSError: none can be loaded; with the reason.
        """
        from transformers import AutoProcessor

        if not self.name:
            raise OSError("the model was not loaded by name")
        try:
            return AutoProcessor.from_pretrained(self.name, **self.arguments)
        except Exception as error:
            try:
                return self.tokenizer()
            except OSError:
                raise OSError(f"none can be loaded from {self.name!r} ({_reason(error)})") from error


def _snapshot(folder: Path) -> tuple[str | None, str]:
    """(commit, subfolder) of a folder in the cache of the Hub, "...snapshots/COMMIT/SUBFOLDER"; else (None, "")."""
    parts = folder.parts
    if "snapshots" not in parts[:-1]:
        return None, ""
    at = len(parts) - 1 - parts[::-1].index("snapshots")
    return parts[at + 1], "/".join(parts[at + 2 :])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
