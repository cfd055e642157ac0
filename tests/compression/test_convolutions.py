"""Convolutions with kernel 1 are linear layers over the channels of every position."""

import peft
import pytest
import torch
import transformers as tf
from helpers import tiny
from torch import nn

import hf_sparselr
from hf_sparselr.compression.convolutions import put_linear, restore_convolutions
from hf_sparselr.compression.experts import compressible_layers
from hf_sparselr.nn.linear import packed_layers
from hf_sparselr.nn.pointwise import PointwiseConvolution, is_pointwise

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def resnet() -> tf.PreTrainedModel:
    """Bottlenecks: kernel 1, kernel 3, kernel 1, with strides in the shortcuts."""
    torch.manual_seed(0)
    config = tf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], num_labels=3)
    model = tf.ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for buffer in (b for name, b in model.named_buffers() if name.endswith("running_var")):
            buffer.uniform_(0.5, 2)
    return model


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def settings(**changes) -> hf_sparselr.SparseLRConfig:
    samples = [{"pixel_values": image[None]} for image in IMAGES]
    return tiny.settings(calibration=samples, on_incompatible="skip", overrides={}, **{"rank": 2, **changes})


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(pixel_values=IMAGES).logits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_layer_computes_the_convolution(kind, stride, bias):
    layer, dimensions = kind(5, 7, 1, stride=stride, bias=bias), KINDS.index(kind) + 1
    assert is_pointwise(layer)
    again = PointwiseConvolution(layer)
    for shape in ((2, 5), (5,)):  # with and without a batch
        inputs = torch.randn(*shape, *(4, 6, 3)[:dimensions])
        assert torch.allclose(again(inputs), layer(inputs), atol=1e-6)
        assert again(inputs).is_contiguous()
    assert torch.equal(again.weight, layer.weight) and again.stride == layer.stride
    back = again.to_convolution()
    assert type(back) is kind and back.weight.data_ptr() == layer.weight.data_ptr() and back.bias is layer.bias
    assert torch.equal(back(inputs), layer(inputs))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1), nn.Linear(4, 4)]
)
def test_other_layers_are_not_pointwise(layer):
    assert not is_pointwise(layer)


def test_convolutions_that_stay_dense_come_back():
    model = resnet()
    before, places = logits(model), {name: type(module) for name, module in model.named_modules()}
    layers = compressible_layers(model)
    assert len(layers) == 3 * 2 + 2 and all(name.endswith("convolution.linear") for name in layers)
    put_linear(model, layers)
    assert torch.allclose(logits(model), before, atol=1e-5)
    restore_convolutions(model)
    assert {name: type(module) for name, module in model.named_modules()} == places
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("refine", [None, "tm+distill"])
def test_a_network_of_convolutions_is_compressed_saved_and_reloaded(refine, tmp_path):
    dense = resnet()
    expected = logits(dense)
    options = {"tm": {"passes": 1}, "distill": {"passes": 1, "self_samples": 0}} if refine else {}
    model = hf_sparselr.compress(dense, settings(refine=refine, **options), tmp_path)
    assert len(packed_layers(model)) == 8 and model.sparselr_report.coverage["dense"] == {}
    again = tf.ResNetForImageClassification.from_pretrained(tmp_path)
    assert tiny.same(tiny.snapshot(again), tiny.snapshot(model))
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - expected).norm() < expected.norm()
    restored = again.dequantize()
    assert not any(isinstance(module, PointwiseConvolution) for module in restored.modules())
    assert torch.allclose(logits(restored), logits(model), atol=1e-5)


def test_layers_that_do_not_fit_stay_convolutions(tmp_path):
    model = hf_sparselr.compress(resnet(), settings(rank=8), tmp_path)  # the bottlenecks have 8 channels
    again = tf.ResNetForImageClassification.from_pretrained(tmp_path)
    assert 0 < len(packed_layers(again)) < 8
    assert sum(map(is_pointwise, again.modules())) == 8 - len(packed_layers(again))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_the_factors_train_as_an_adapter():
    model = hf_sparselr.compress(resnet(), settings())
    before = logits(model)
    adapted = hf_sparselr.as_peft_model(model)
    assert torch.equal(logits(adapted), before)
    adapted(pixel_values=IMAGES).logits.square().sum().backward()
    factors = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(factors) == 16 and all(bool(p.grad.any()) for p in factors)


def test_portable_parts_give_the_outputs_and_refine_takes_them(tmp_path):
    model = hf_sparselr.compress(resnet(), settings())
    base, adapter = hf_sparselr.export_portable(model, tmp_path)
    plain = peft.PeftModel.from_pretrained(tf.ResNetForImageClassification.from_pretrained(base), adapter).eval()
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)
    refined = hf_sparselr.refine(plain, settings(refine="tm", tm={"passes": 1}), reference=resnet())
    assert packed_layers(refined).keys() == packed_layers(model).keys()
