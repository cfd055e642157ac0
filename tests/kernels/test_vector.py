"""The blocks of `cuda/vector.cu`, without a GPU; the kernel itself: test_vector_gpu.py."""

import pytest
import torch

from hf_sparselr.format.patterns import Unstructured
from hf_sparselr.kernels.ahead import Kind, stand_in
from hf_sparselr.kernels.cuda import vector, wgmma
from hf_sparselr.kernels.cuda.vector import shape_of
from hf_sparselr.kernels.support_index import index_of


@pytest.mark.parametrize("outs", [(1,), (64,), (4096,), (14336,), (128256,), (4096, 1024, 1024), (14336, 14336)])
@pytest.mark.parametrize("ins", [8, 576, 4096, 14336, 16384])
@pytest.mark.parametrize("warps", [1, 16])
def test_warps_have_all_columns_and_rows(outs: tuple[int, ...], ins: int, warps: int) -> None:
    shape = shape_of(outs, ins, warps, 132)
    assert shape.steps <= 8 and shape.slices * shape.groups <= 16
    assert (shape.slices - 1) * shape.steps * 128 < ins <= shape.slices * shape.steps * 128
    assert shape.top % 2 == 0 and shape.top <= 32 * shape.groups


def test_blocks_come_in_whole_turns() -> None:
    for outs, ins in (((14336,), 4096), ((4096,), 14336), ((4096,), 4096), ((1024,), 4096), ((4096, 1024, 1024), 4096)):
        top = shape_of(outs, ins, 16, 132).top
        assert 116 <= sum(-(-out // top) for out in outs) <= 132


def test_a_weight_with_factors_shares_no_launch_with_one_of_rank_zero() -> None:
    """The first weight of a launch says whether there are any."""
    weight = stand_in(Kind(16, 128, Unstructured(0.5), 8, False, torch.bfloat16), torch.device("cpu"))
    none = weight._replace(A=weight.A[:0], B=weight.B[:, :0].contiguous())
    index = index_of(weight.mask, weight.in_features)
    none.check()
    assert vector.kind_of(weight, index) != vector.kind_of(none, index)
    assert wgmma.kind_of(weight) != wgmma.kind_of(none)
