"""What is derived from tensors follows them: their edits, and their end."""

import gc
import threading

import pytest
import torch
from helpers.kernel_cases import DEVICE, SUPPORTS, problem
from torch.nn import functional as F

from hf_sparselr.format.bitmask import pack
from hf_sparselr.kernels.support_index import build_index, index_of
from hf_sparselr.kernels.tensor_cache import TensorCache


@pytest.mark.parametrize(("out", "n", "kind"), SUPPORTS)
def test_the_index_finds_every_value(out: int, n: int, kind: str | float) -> None:
    case = problem(out, n, kind)
    index = build_index(case.mask, n)
    support = F.pad(case.support, (0, -n % 64)).unflatten(1, (-1, 64))
    counts = support.sum(-1)
    before = counts.flatten().cumsum(0).view_as(counts) - counts
    assert index.nonzeros == case.values.numel() and index.shape == tuple(counts.shape)
    if index.per_block:
        assert (counts == index.per_block).all()
    else:
        assert torch.equal(index.starts[:, None] + index.offsets, before)
    assert index.pairs == (n % 64 == 0 and bool((support.unflatten(-1, (-1, 4)).sum(-1) == 2).all()))


@pytest.mark.parametrize("n", [40_000, 70_000])
def test_long_rows_wrap_no_offset(n: int) -> None:
    mask, _ = pack(torch.zeros(2, n, device=DEVICE), torch.ones(2, n, dtype=torch.bool, device=DEVICE))
    mask[0, 0] = 0xFE  # else every block would keep 64, and there would be no table
    offsets = build_index(mask, n).offsets.to(torch.int64)
    assert torch.equal(offsets[1] % 2**16 if n < 2**16 else offsets[1], torch.arange(0, n, 64, device=DEVICE))


def test_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparselr.kernels.support_index._LIMIT", 3)
    with pytest.raises(ValueError, match="keeps 64 values"):
        build_index(problem(2, 64, 0.5).mask, 64)


@pytest.mark.parametrize("inference", [False, True])
def test_the_index_follows_edits_of_the_mask(inference: bool) -> None:
    mask = problem(4, 64, 0.5).mask
    first = index_of(mask, 64)
    assert index_of(mask, 64) is first and index_of(mask.detach(), 64) is first
    with torch.inference_mode(inference):
        mask.zero_()
    assert index_of(mask, 64).nonzeros == 0 and index_of(mask.clone(), 64) is not index_of(mask, 64)


def test_an_entry_dies_with_the_memory_of_its_sources() -> None:
    cache: TensorCache[list] = TensorCache()
    first, second = torch.zeros(4), torch.zeros(4)
    cache.put("key", [1], [first, second])
    view = second.view(2, 2)
    del second
    assert cache.get("key") == [1]  # the view holds the memory
    gc.disable()
    try:
        del view
        assert cache.get("key") is None and len(cache) == 0
    finally:
        gc.enable()


def test_threads_build_an_entry_once() -> None:
    cache: TensorCache[object] = TensorCache()
    source, built, found = torch.zeros(4), [], []
    barrier = threading.Barrier(8)

    def build() -> object:
        built.append(1)
        return object()

    def look() -> None:
        barrier.wait()
        for key in range(50):
            found.append((key, cache.keep(key, [source], build, lambda value: True)))

    threads = [threading.Thread(target=look) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(built) == 50 and len(set(found)) == 50
