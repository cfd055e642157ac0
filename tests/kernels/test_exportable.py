"""The form of the product that exporters translate, here and in ONNX's own runtime."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.kernels import exportable_linear
from hf_sparselr.nn.linear import SparseLRLinear


def layer(outs, ins, rank, bias, density=0.4):
    mask = torch.rand(outs, ins) < density
    A, B = (torch.randn(rank, ins), torch.randn(outs, rank)) if rank else (None, None)
    found = Decomposition(torch.randn(outs, ins) * mask, mask, A, B, {})
    return SparseLRLinear.from_decomposition(found, torch.randn(outs) if bias else None)


@pytest.mark.parametrize(("outs", "ins", "rank", "bias"), [(5, 16, 0, False), (7, 13, 3, True), (1, 70, 1, True)])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_it_is_the_product(outs, ins, rank, bias, density):
    packed = layer(outs, ins, rank, bias, density)
    x = torch.randn(2, 3, ins)
    expected = F.linear(x, packed.weight + 0, packed.bias)
    torch.testing.assert_close(exportable_linear(x, packed.packed_weight), expected, atol=1e-5, rtol=1e-5)


def test_onnx_runtime_computes_it(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    large = layer(200, 400, 4, True)  # small masks are folded while exporting
    model = nn.Sequential(large, nn.ReLU(), layer(9, 200, 0, False))
    x = torch.randn(3, 400)
    path = tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("rows")},)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    session = runtime.InferenceSession(path)
    name = session.get_inputs()[0].name
    for rows in (3, 1, 8):
        x = torch.randn(rows, 400)
        (found,) = session.run(None, {name: x.numpy()})
        np.testing.assert_allclose(found, model(x).detach(), rtol=1e-4, atol=1e-3)
    packed = sum(p.numel() * p.element_size() for p in model.parameters())
    assert path.stat().st_size < packed + 60_000  # dense, it would be 327,200 bytes
    assert path.stat().st_size < 4 * (200 * 400 + 9 * 200)
