"""Models of every kind: their inputs, their blocks, the layers in these, and what is said of the rest."""

import logging
import math

import pytest
import torch
import transformers as tf
from helpers import tiny
from torch import nn

from hf_sparselr import compress
from hf_sparselr.compression.linear_layers import is_linear
from hf_sparselr.compression.model_structure import context_length, find_stacks
from hf_sparselr.nn.linear import packed_layers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": tiny.VOCAB, "pad_token_id": 0, "max_position_embeddings": 64}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
SHORT = {"min_iterations": 2, "max_iterations": 2, "refit_rounds": 0, "precision": "fp32"}


def build(cls: type, config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return cls._from_config(config).eval()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def images(count: int = 4) -> list[dict]:
    return [{"pixel_values": image[None]} for image in random(count, 3, 16, 16)]


def vit() -> tf.PreTrainedModel:
    return build(tf.ViTForImageClassification, tf.ViTConfig(**VISION))


def llava() -> tf.PreTrainedModel:
    text, vision = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**VISION)
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=90)
    return build(tf.LlavaForConditionalGeneration, config)


@torch.no_grad()
def outputs(model, inputs: dict) -> torch.Tensor:
    return model(**inputs)[0]


def round_trip(model, settings, inputs: dict, folder) -> tf.PreTrainedModel:
    """Compresses, saves and reloads a model; the reloaded one gives the same bits."""
    model = compress(model, settings, folder)
    again = type(model).from_pretrained(folder).eval()
    assert torch.equal(outputs(model, inputs), outputs(again, inputs))
    return model


@pytest.fixture
def messages():
    """The warnings of the package."""
    found: list[str] = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("hf_sparselr")
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


# Inputs


@pytest.mark.parametrize("refine", [None, "tm", "tm+distill"])
def test_images_calibrate_a_vision_model(refine, tmp_path):
    options = {"tm": {"passes": 1}, "distill": {"passes": 1, "self_samples": 0, "precision": "fp32"}}
    settings = tiny.settings(calibration=images(), refine=refine, **options)
    model = round_trip(vit(), settings, images(1)[0], tmp_path)
    assert len(packed_layers(model)) == 12


def test_batches_rows_and_iterables_are_the_same_samples():
    rows = images()
    batch = [{"pixel_values": torch.cat([row["pixel_values"] for row in rows])}]
    found = [compress(vit(), tiny.settings(calibration=data)) for data in (rows, batch, iter(rows))]
    states = [tiny.snapshot(model) for model in found]
    assert tiny.same(states[0], states[1]) and tiny.same(states[0], states[2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images(2), r"has 2 samples, num_samples=4 are needed"),
        ([{"pixels": image["pixel_values"]} for image in images()], r"model input 'pixels', which ViTFor"),
        (
            [{"pixel_values": math.nan * image["pixel_values"]} for image in images()],
            r"pixel_values holds NaN",
        ),
        ([{"pixel_values": {"a": 1}} for _ in range(4)], r"pixel_values is a dict, expected a tensor"),
    ],
)
def test_wrong_inputs_are_named_before_the_work(data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        compress(vit(), tiny.settings(calibration=data))


def speech() -> tf.PreTrainedModel:
    config = tf.WhisperConfig(
        vocab_size=tiny.VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=16,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return build(tf.WhisperForConditionalGeneration, config)


def test_features_calibrate_both_stacks_of_a_speech_model(tmp_path):
    data = [{"input_features": random(1, 8, 32), "decoder_input_ids": ids[None]} for ids in tiny.IDS]
    model = round_trip(speech(), tiny.settings(calibration=data), data[0], tmp_path)
    assert {name.split(".")[1] for name in packed_layers(model)} == {"encoder", "decoder"}


@torch.no_grad()
def predicting(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """The model with weights large enough for its predictions to differ from one another."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)
    return model


@pytest.mark.parametrize("refine", [None, "tm", "distill"])
def test_padding_counts_nowhere(refine):
    """Padded rows, and the same rows without padding, give the same model up to rounding."""
    lengths = [32, 20, 20, 7]
    rows = list(zip(tiny.IDS, lengths, strict=True))
    real = [{"input_ids": ids[None, :n], "token_type_ids": torch.zeros(1, n).long()} for ids, n in rows]
    padded = [
        {
            "input_ids": torch.cat([ids[:n], torch.full((32 - n,), 7)])[None],
            "token_type_ids": torch.zeros(1, 32).long(),
            "attention_mask": (torch.arange(32) < n).long()[None],
        }
        for ids, n in rows
    ]
    options = {
        "method_options": SHORT,
        "tm": {"passes": 1, "precision": "fp32", "batch_size": 4},
        "distill": {"passes": 1, "self_samples": 0, "precision": "fp32", "batch_size": 4},
    }
    models = [
        compress(predicting(tiny.build("bert-mlm")), tiny.settings(calibration=data, refine=refine, **options))
        for data in (real, padded)
    ]
    for left, right in zip(*(model.sparselr_report.layers for model in models), strict=True):
        assert left["relative_error"] == pytest.approx(right["relative_error"], rel=1e-3)
    for left, right in zip(*(model.sparselr_report.blocks for model in models), strict=True):
        if left["tm"]:
            assert left["tm"]["loss_before"] == pytest.approx(right["tm"]["loss_before"], rel=1e-3)
    if refine == "distill":
        before = [model.sparselr_report.distill["loss_before"] for model in models]
        assert before[0] == pytest.approx(before[1], rel=1e-3)
    torch.testing.assert_close(*(tiny.logits(model) for model in models), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_stacks_that_no_input_reaches(policy, messages):
    model = llava()
    settings = tiny.settings(on_incompatible=policy)
    if policy == "error":
        message = r"no calibration sample reaches .*vision_tower.*\(12 layers\).*ignore="
        with pytest.raises(ValueError, match=message):
            compress(model, settings)
        assert not packed_layers(model)
        return
    compress(model, settings)
    assert len(packed_layers(model)) == 14
    assert any("12 layers stay dense" in message for message in messages)
    assert len(model.sparselr_report.dense) == 12


def test_text_alone_compresses_a_language_model_whose_tower_is_ignored(tmp_path):
    model = round_trip(llava(), tiny.settings(ignore=["vision_tower"]), {"input_ids": tiny.IDS[:2]}, tmp_path)
    assert len(packed_layers(model)) == 14


def test_images_with_text_reach_both():
    ids = tiny.IDS[:, :12].clone()
    ids[:, 2:6] = 90
    data = [{"input_ids": row[None], **image} for row, image in zip(ids, images(), strict=True)]
    assert len(packed_layers(compress(llava(), tiny.settings(calibration=data)))) == 14 + 12


# Blocks and layers


@pytest.mark.parametrize(
    ("cls", "config", "stacks"),
    [
        (
            tf.OpenAIGPTLMHeadModel,
            tf.OpenAIGPTConfig(vocab_size=tiny.VOCAB, n_embd=32, n_layer=2, n_head=4),
            ["transformer.h"],
        ),
        (tf.MPNetModel, tf.MPNetConfig(**TEXT), ["encoder.layer"]),
        (tf.AlbertModel, tf.AlbertConfig(**TEXT, embedding_size=16), ["encoder.albert_layer_groups"]),
        (
            tf.FalconForCausalLM,
            tf.FalconConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
            ["transformer.h"],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("refine", [None, "tm"])
def test_blocks_are_found_by_structure(cls, config, stacks, refine, tmp_path):
    model = build(cls, config)
    assert list(find_stacks(model)) == stacks
    settings = tiny.settings(refine=refine, tm={"passes": 2})
    report = round_trip(model, settings, {"input_ids": tiny.IDS}, tmp_path).sparselr_report
    names = [row["name"] for row in report.layers]
    assert len(names) == len(set(names)) >= 4
    assert all(not row["tm"] or row["tm"]["loss_after"] <= row["tm"]["loss_before"] for row in report.blocks)


def test_a_block_that_is_called_twice_is_solved_on_both_inputs():
    """The relative error is that of all its calls, the second one on what the compressed block gave in the first."""
    model = build(tf.AlbertModel, tf.AlbertConfig(**TEXT, embedding_size=16))
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    dense = model.get_submodule(name).weight.detach().clone()
    inputs: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    outputs(model, {"input_ids": tiny.IDS})
    hook.remove()
    compress(model, tiny.settings(batch_size=4))
    row = next(row for row in model.sparselr_report.layers if row["name"] == name)
    x = torch.cat([part.flatten(0, 1) for part in inputs])  # the first layer: its inputs are those of the dense model
    assert len(inputs) == 2
    change = model.get_submodule(name).weight - dense
    error = float((x @ change.T).square().sum() / (x @ dense.T).square().sum())
    assert row["relative_error"] == pytest.approx(error, rel=1e-3)


def test_a_layer_that_is_called_twice_is_solved_once():
    config = tf.DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=8
    )
    names = [row["name"] for row in compress(build(tf.DebertaV2Model, config), tiny.settings()).sparselr_report.layers]
    assert len(names) == len(set(names)) == 12


@pytest.mark.parametrize("refine", [None, "tm"])
def test_weights_that_blocks_share_stay_shared_and_dense(refine, messages):
    model = tiny.build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp  # one module
    first, second = (layer.input_layernorm for layer in model.model.layers)
    second.weight = first.weight  # one parameter
    norm = first.weight.detach().clone()
    compress(model, tiny.settings(refine=refine, tm={"passes": 2, "lr": 1e-3}))
    left, right = model.model.layers
    assert len(packed_layers(model)) == 8 and any("several blocks share" in message for message in messages)
    assert left.mlp.up_proj.weight is right.mlp.up_proj.weight
    assert left.input_layernorm.weight is right.input_layernorm.weight
    assert torch.equal(left.input_layernorm.weight, norm)


def test_branches_that_are_not_taken_stay_dense_and_are_said(messages, tmp_path):
    config = tf.BartConfig(
        vocab_size=tiny.VOCAB, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64
    )
    model = round_trip(build(tf.BartForCausalLM, config), tiny.settings(), {"input_ids": tiny.IDS}, tmp_path)
    dense = model.sparselr_report.dense
    assert len(dense) == 8 and all("encoder_attn" in name for name in dense)
    assert set(dense.values()) == {"no calibration input reached it"}


def test_weights_that_are_read_stay_dense_and_are_said():
    model = compress(tiny.build("mamba"), tiny.settings(rank=2))
    assert model.sparselr_report.dense == {
        f"backbone.layers.{i}.mixer.dt_proj": "its weight is read, the layer is not called" for i in (0, 1)
    }


def test_weights_that_a_model_writes_to_stay_dense_and_are_said(messages, tmp_path):
    config = tf.RwkvConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, rescale_every=1)
    model = build(tf.RwkvForCausalLM, config).train()  # its first pass in eval mode divides some weights
    compress(model, tiny.settings())
    dense = model.sparselr_report.dense
    assert len(dense) == 4 and set(dense.values()) == {"the model writes to their weights while it runs"}
    assert any("4 layers stay dense" in message for message in messages)
    assert torch.isfinite(outputs(model.eval(), {"input_ids": tiny.IDS})).all()


def test_modules_that_a_model_replaces_while_it_runs(tmp_path):
    config = tf.BigBirdConfig(**TEXT, block_size=8, num_random_blocks=1)
    model = build(tf.BigBirdModel, config).train()
    round_trip(model, tiny.settings(), {"input_ids": tiny.IDS}, tmp_path)
    assert all(part.training for part in model.train().modules())


class Renamed(nn.Linear):
    """Its own forward, the same result."""

    def forward(self, inputs):
        product = inputs @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


@pytest.mark.parametrize("bias", [False, True])
def test_a_subclass_is_linear_if_it_behaves_so(bias):
    with torch.device("meta"):
        assert is_linear(Renamed(64, 32, bias)) and not is_linear(Scaled(64, 32, bias))
    assert is_linear(Renamed(4, 8, bias)) and is_linear(nn.Linear(4, 8, bias))
    assert not is_linear(nn.Embedding(4, 8))


def test_the_attention_implementation_still_switches():
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    compress(model, tiny.settings())
    before = tiny.logits(model)
    model.set_attn_implementation("sdpa")
    assert model.model.layers[0].self_attn.config is model.config
    torch.testing.assert_close(tiny.logits(model), before, atol=1e-4, rtol=1e-4)


def test_rows_of_position_embeddings_that_padding_takes_are_no_context():
    config = tf.RobertaConfig(**{**TEXT, "max_position_embeddings": 34, "pad_token_id": 1})
    model = build(tf.RobertaModel, config)
    assert context_length(model) == 32
    compress(model, tiny.settings(calibration=tiny.IDS.repeat(1, 2), seq_len=2048))
    assert context_length(tiny.build("llama")) == 64


def test_classifiers_are_distilled(tmp_path):
    model = build(tf.LlamaForSequenceClassification, tf.LlamaConfig(**{**TEXT, "pad_token_id": None}))
    options = {"passes": 2, "self_samples": 0, "precision": "fp32", "lr": 1e-3}
    report = compress(model, tiny.settings(refine="distill", distill=options)).sparselr_report
    assert report.distill["loss_after"] <= report.distill["loss_before"]


def test_an_error_in_the_middle_names_the_layer():
    model = tiny.build("llama")
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(1e30)
    with pytest.raises((ValueError, RuntimeError), match=r"^model\.layers\.1\.mlp\.gate_proj: "):
        compress(model, tiny.settings())


def test_little_coverage_is_a_warning(messages):
    model = compress(tiny.build("llama"), tiny.settings(targets=["q_proj"]))
    found = model.sparselr_report.coverage
    packed = sum(layer.in_features * layer.out_features for layer in packed_layers(model).values())
    linear = sum(p.numel() for name, p in tiny.build("llama").model.layers.named_parameters() if p.ndim > 1)
    assert (found["packed"], found["total"]) == (packed, linear)
    assert len(found["dense"]) == 12
    assert any(message.startswith("only 11% of the linear weights") for message in messages)
    messages.clear()
    compress(tiny.build("llama"), tiny.settings(targets=["mlp"]))
    assert not messages


def test_a_model_that_fails_on_a_sample_is_a_clear_error():
    samples = [{"pixel_values": random(1, 3, 24, 24)}] * 4  # the model takes 16 x 16
    with pytest.raises(ValueError, match="ViTForImageClassification cannot be run on a calibration sample with pixel"):
        compress(vit(), tiny.settings(calibration=samples))


def test_embeddings_that_make_the_logits_too_do_not_end_a_pass():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    config = tf.FSMTConfig(src_vocab_size=96, tgt_vocab_size=96, d_model=32, **sizes, **heads)
    model = build(tf.FSMTForConditionalGeneration, config)
    assert isinstance(model.get_output_embeddings(), nn.Embedding)
    compress(model, tiny.settings())
    assert model.sparselr_report.coverage["dense"] == {}


def test_tied_weights_count_once():
    model = tiny.build("llama")
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    linear = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.ndim > 1)
    compress(model, tiny.settings(targets=["q_proj"]))
    assert model.sparselr_report.coverage["total"] == linear


def test_train_of_a_block_may_return_nothing(monkeypatch):
    model = tiny.build("llama")  # LeViT's attention overrides `train` so
    monkeypatch.setattr(
        type(model.model.layers[0]), "train", lambda self, mode=True: nn.Module.train(self, mode) and None
    )
    assert len(packed_layers(compress(model, tiny.settings()))) == 14
