"""Tensors whose data lie in a file: the operating system reads and writes their pages when they are used."""

import errno
import os
import tempfile
from pathlib import Path

import torch

_MARK = "_sparselr_on_disk"


def on_disk(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, on the CPU, in a file of the temporary folder (TMPDIR); one that is in a file is returned.

    The file has no name, so it is gone with the tensor, or with the process.

    Raises:
        OSError: the folder is full.
    """
    if getattr(tensor, _MARK, False):
        return tensor
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor.cpu()
    descriptor, name = tempfile.mkstemp(prefix="sparselr-")
    try:
        _reserve(descriptor, size)
        copy = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    finally:
        os.close(descriptor)
        Path(name).unlink()
    setattr(copy, _MARK, True)
    return copy.copy_(tensor)


def _reserve(descriptor: int, size: int) -> None:
    """Gives a file its size on the disk: a page of it that found no room later would kill the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        folder = tempfile.gettempdir()
        raise OSError(
            f"activations='disk': no {size:,} bytes are free in {folder!r}; set TMPDIR to another folder"
        ) from error
