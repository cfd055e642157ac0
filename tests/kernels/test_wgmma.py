"""The blocks of `cuda/wgmma.cu`, without a GPU; the kernel itself: test_wgmma_gpu.py."""

import itertools

import pytest

from hf_sparselr.kernels.cuda.wgmma import tile_of
from hf_sparselr.kernels.launch_config import wide_config

MULTIPROCESSOR = 228 * 1024  # bytes of shared memory, of which the system takes 1024 for each block


@pytest.mark.parametrize("rows", [1, 17, 32, 33, 64, 100, 256, 257, 512, 3000, 10**6])
def test_blocks_fit_a_multiprocessor(rows: int) -> None:
    for outs, ins in itertools.product((1, 64, 576, 1024, 4096, 14336, 128256), (16, 576, 4096, 14336)):
        config = wide_config(rows, outs, ins, 132)
        assert config.split * config.cluster <= 8  # blocks of a cluster that every GPU takes
        assert (config.split - 1) * 256 < ins
        tile = tile_of(config)
        assert config.resident * (tile.shared + 1024) <= MULTIPROCESSOR
        stages = tile.stages * tile.columns * (config.rows + 2 * config.batch)
        results = 2 * config.rows if config.split == 1 else 4 * (config.rows + 4)  # bytes for a row of x
        assert tile.stages >= 3 and results * config.batch <= stages < tile.shared


def test_few_rows_of_a_weight_keep_the_gpu_busy() -> None:
    for rows, outs, ins in itertools.product((32, 64, 128, 256), (4096, 14336), (4096, 14336)):
        config = wide_config(rows, outs, ins, 132)
        blocks = -(-outs // config.rows) * -(-rows // config.batch) * config.split
        assert blocks >= 64
