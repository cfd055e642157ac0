"""Tensors in files: the same values, no files left, and an error where a page could find no room."""

import errno
import os
import tempfile

import pytest
import torch

from hf_sparselr.utils import disk_tensors
from hf_sparselr.utils.disk_tensors import on_disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_values_and_writes_stay(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = torch.randn(3, 5, 7).to(dtype)
    kept = on_disk(tensor)
    assert kept.dtype == dtype and torch.equal(kept, tensor) and kept.data_ptr() != tensor.data_ptr()
    assert on_disk(kept) is kept
    kept[0] = 0
    assert not kept[0].any() and torch.equal(kept[1:], tensor[1:])
    assert not list(tmp_path.iterdir())


def test_no_values_need_no_file():
    assert on_disk(torch.zeros(0, 4)).shape == (0, 4)


def test_a_full_folder_is_an_error(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_tensors.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"activations='disk': no 40 bytes are free in .*; set TMPDIR to another folder"):
        on_disk(torch.zeros(10))
