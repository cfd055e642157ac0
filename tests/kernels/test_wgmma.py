"""The blocks of `cuda/wgmma.cu`, without a GPU; the kernel itself: test_wgmma_gpu.py."""

import itertools

import pytest
import torch

from hf_sparselr.kernels.cuda import low_rank
from hf_sparselr.kernels.cuda.low_rank import wide_shape
from hf_sparselr.kernels.cuda.wgmma import tile_of
from hf_sparselr.kernels.launch_config import takes_wide, wide_config

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


@pytest.mark.parametrize(
    ("outs", "ins", "rows"),
    [
        (14336, 4096, 2),
        (4096, 14336, 2),
        (16384, 2048, 2),
        (2048, 8192, 2),
        (6144, 4096, 9),
        (4096, 4096, 9),
        (576, 576, 17),
    ],
)
def test_wgmma_takes_so_many_rows_and_more(outs: int, ins: int, rows: int) -> None:
    """As measured on an H200: NOTES.md."""
    assert all(takes_wide(many, outs, ins, 132) for many in (rows, 17, 10**6))
    assert not takes_wide(rows - 1, outs, ins, 132) and not takes_wide(1, outs, ins, 132)


def test_few_columns_of_many_rows_are_shared_by_more_blocks() -> None:
    for rows, outs, ins in itertools.product((128, 256, 512), (576, 1024, 2048), (576, 1536, 2048, 4096)):
        config = wide_config(rows, outs, ins, 132)
        blocks = -(-outs // config.rows) * -(-rows // config.batch) * config.split
        assert blocks >= 90 or (config.rows, config.batch) == (64, 64)


@pytest.mark.parametrize("rows", [1, 64, 65, 256, 512, 513, 2048, 4096, 4097, 10**6])
def test_the_blocks_before_a_product_fit_a_multiprocessor(rows: int) -> None:
    for blocks in (1, 124, 132, 256, 1000):
        batch, split, stages = wide_shape(rows, [64], blocks, 132)
        assert split <= 8
        stage, sums = 128 * (64 + batch) + 16, 4 * (64 + 4) * batch if split > 1 else 128 * batch
        assert sums <= stages * stage <= MULTIPROCESSOR - 2048


def test_long_blocks_take_no_turn_of_their_own() -> None:
    assert wide_shape(2048, [64], 256, 132) == wide_shape(2048, [64, 64], 1000, 132)  # 264 of 264; 1016 of 1056
    assert wide_shape(2048, [64], 128, 132) == wide_shape(2048, [65], 256, 132) != wide_shape(2048, [64], 256, 132)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_arguments_are_as_long_as_the_driver_reads(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A struct with tensor maps is a multiple of 64 bytes; C takes 256 words."""
    launches: list[tuple] = []
    monkeypatch.setattr(low_rank, "load_function", lambda *_: 0)
    monkeypatch.setattr(low_rank, "tensor_map", lambda *_: [0] * 16)
    monkeypatch.setattr(low_rank, "DriverLaunch", lambda *args: launches.append(args))
    wide = low_rank._Wide(0, torch.bfloat16, wide_shape(2048, [64] * count, 256, 132), None)
    wide.launch([(0, 64, 3 + number) for number in range(count)], 1024)
    words = 16 + 56 * count + 8
    assert len(launches[0][4]) == words <= 256 and words % 8 == 0
