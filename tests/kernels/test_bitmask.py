"""The blocks of `cuda/bitmask.cu`, without a GPU; the kernel itself: test_bitmask_gpu.py."""

import pytest

from hf_sparselr.kernels.cuda.bitmask import room_for, stride_of
from hf_sparselr.kernels.launch_config import bitmask_config

MULTIPROCESSOR = 228 * 1024  # bytes of shared memory, of which the system takes 1024 for each block


@pytest.mark.parametrize("rows", [2, 9, 16, 17, 32, 33, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("outs", [1024, 4096, 8192, 14336, 28672])
@pytest.mark.parametrize("densest", [1, 60, 85, 128])
def test_chosen_blocks_fit_a_multiprocessor(rows: int, outs: int, densest: int) -> None:
    config = bitmask_config(rows, outs, 132)
    batch = max(8, min(128, 1 << (rows - 1).bit_length()))
    room = room_for(config, batch, stride_of(densest))
    assert room.stages >= 2 and room.x_stages >= 3
    assert config.resident * (room.shared + 1024) <= MULTIPROCESSOR
