"""Short digests by which a run that goes on notices that its inputs are others."""

import hashlib
import os
from collections.abc import Iterable, Mapping

import torch

_SAMPLES = 64  # pieces of a file that are read
_PIECE = 4096
_VALUES = 16  # of a tensor


def of_files(files: Iterable[str | os.PathLike]) -> str:
    """Of names, sizes and pieces of files: their starts, with the headers, and 64 pages spread over each."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(map(os.fspath, files), key=os.path.basename):
        size = os.path.getsize(file)
        digest.update(f"{os.path.basename(file)} {size}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(2**16))
            for number in range(_SAMPLES):
                stream.seek(size * number // _SAMPLES)
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def of_tensors(tensors: Mapping[str, torch.Tensor], every: bool = False) -> str:
    """Of names, dtypes, shapes and 16 values of each tensor, or of every value."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        if not every and flat.numel() > _VALUES:
            flat = flat[torch.linspace(0, flat.numel() - 1, _VALUES, dtype=torch.float64).long().to(flat.device)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
