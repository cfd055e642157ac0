"""setuptools' build backend. It adds one top-level module to every wheel, also to editable ones."""

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the other hooks)

_MODULE = Path(__file__).with_name("hf_sparselr_autoload.py")


def build_wheel(wheel_directory: str, *args: Any, **kwargs: Any) -> str:
    """PEP 517's hook. Returns the file name of the wheel."""
    return _add_module(wheel_directory, build_meta.build_wheel(wheel_directory, *args, **kwargs))


def build_editable(wheel_directory: str, *args: Any, **kwargs: Any) -> str:
    """PEP 660's hook. Returns the file name of the wheel."""
    return _add_module(wheel_directory, build_meta.build_editable(wheel_directory, *args, **kwargs))


def _add_module(wheel_directory: str, file_name: str) -> str:
    wheel = Path(wheel_directory, file_name)
    with zipfile.ZipFile(wheel) as old:
        files = [(info, old.read(info)) for info in old.infolist()]
    content = _MODULE.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    line = f"{_MODULE.name},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr(_MODULE.name, content)
        for info, data in files:
            is_record = info.filename.endswith(".dist-info/RECORD")
            new.writestr(info, line.encode() + data if is_record else data)
    return file_name
