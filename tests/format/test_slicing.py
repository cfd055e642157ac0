import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_sparselr.format.bitmask import pack, unpack
from hf_sparselr.format.slicing import take_columns, take_rows

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40))


def sparse(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < torch.rand((), generator=generator)
    return torch.randn(shape, generator=generator) * mask, mask


@given(SHAPES, st.integers(0, 99), st.data())
def test_rows_in_any_order(shape, seed, data):
    S, mask = sparse(shape, seed)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=12)), dtype=torch.long)
    found = unpack(*take_rows(*pack(S, mask), rows), shape[1])
    assert torch.equal(found, S[rows])


@given(SHAPES, st.integers(0, 99), st.data())
def test_columns(shape, seed, data):
    S, mask = sparse(shape, seed)
    start = data.draw(st.integers(0, shape[1] - 1))
    stop = data.draw(st.integers(start + 1, shape[1]))
    found = unpack(*take_columns(*pack(S, mask), start, stop), stop - start)
    assert torch.equal(found, S[:, start:stop])


def test_slices_own_their_memory():
    S, mask = sparse((4, 16), 0)
    packed, values = pack(S, mask)
    for part, whole in zip(take_rows(packed, values, torch.tensor([1, 2])), (packed, values), strict=True):
        assert part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
