"""Sources of calibration and evaluation text: files, the Hub, data sets."""

import glob
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILES = "file:"  # starts a source that is a glob of text files
C4 = "allenai/c4"  # the calibration data of a config that names none

COLUMNS = {"messages": "chats", "input_ids": "token ids", "text": "texts"}
INSTEAD = '"file:GLOB", a list of texts, or token tensors'


def is_dataset(data: Any) -> bool:
    """Whether data are a `datasets.Dataset` or `IterableDataset`."""
    datasets = sys.modules.get("datasets")  # nobody holds a Dataset without having imported the library
    return datasets is not None and isinstance(data, datasets.Dataset | datasets.IterableDataset)


def column_of(columns: Iterable[str], source: str) -> str:
    for column in COLUMNS:
        if column in columns:
            return column
    raise ValueError(f"{source} has columns {list(columns)}: rename one to {' or '.join(COLUMNS)}")


def load_split(name: str, split: str, where: str, instead: str, **options: Any) -> Any:
    """One split of a Hub data set "id" or "id:config".

    Args:
        where: the field and value that an error names.
        instead: the advice of an error.
        options: for `datasets.load_dataset`.

    Raises:
        OSError: it cannot be loaded, whatever the reason.
    """
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        return load_dataset(path, config or None, split=split, **options)
    except Exception as error:  # the library raises many unrelated types for "not there" and "no network"
        what = f"{where}: the {split} split of this Hub data set cannot be loaded ({error})"
        raise OSError(f"{what}: pass {instead}") from error


def read_files(name: str, where: str) -> list[str]:
    """The texts of the UTF-8 files that "file:GLOB" matches, in the order of their paths.

    Raises:
        ValueError: starting with `where`; no file matches, or one is not UTF-8.
    """
    paths = sorted(filter(os.path.isfile, glob.glob(name.removeprefix(FILES), recursive=True)))
    if not paths:
        raise ValueError(f"{where} matches no file: pass a glob of UTF-8 text files")
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {path} is not UTF-8: pass only text files") from error
    return texts


def load_texts(source: str, split: str = "train", field: str = "source") -> list[str]:
    """The texts of files or of a Hub data set.

    Args:
        source: "file:GLOB" of UTF-8 text files, or a Hub data set ("id" or "id:config") with a text column.
        split: of a Hub data set.
        field: the name of the argument in error messages.

    Raises:
        ValueError: no file matches, a file is not UTF-8, or the data set has no text column.
        OSError: the data set cannot be loaded.
    """
    where = f"{field}={source!r}"
    if source.startswith(FILES):
        return read_files(source, where)
    rows = load_split(source, split, where, '"file:GLOB"')
    if "text" not in rows.column_names:
        raise ValueError(f"{where} has columns {rows.column_names}: expected one named text")
    return [text for text in rows["text"] if text is not None]
