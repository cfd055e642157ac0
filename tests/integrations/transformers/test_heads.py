"""Which modules belong to a task, and what PEFT calls it."""

import pytest
import torch
import transformers as tf
from helpers import tiny
from helpers.peft_models import pack_blocks
from torch import nn

from hf_sparselr import compress
from hf_sparselr.integrations.transformers.heads import heads, task_type

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in {"layers": 2, "ffn_dim": 64}.items()},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "vocab_size": 96,
    "d_model": 32,
}
WHISPER = {**BART, "max_source_positions": 16, "num_mel_bins": 8, "pad_token_id": 0}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}

CASES = [
    (tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT), "CAUSAL_LM", set()),
    (tf.LlamaModel, tf.LlamaConfig(**TEXT), "FEATURE_EXTRACTION", set()),
    (tf.LlamaForSequenceClassification, tf.LlamaConfig(**TEXT), "SEQ_CLS", {"score"}),
    (tf.LlamaForQuestionAnswering, tf.LlamaConfig(**TEXT), "QUESTION_ANS", {"qa_outputs"}),
    (tf.BertModel, tf.BertConfig(**TEXT), "FEATURE_EXTRACTION", set()),
    (tf.BertForMaskedLM, tf.BertConfig(**TEXT), None, set()),
    (tf.BertForTokenClassification, tf.BertConfig(**TEXT), "TOKEN_CLS", {"classifier"}),
    (tf.BertForMultipleChoice, tf.BertConfig(**TEXT), None, {"classifier"}),
    (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=64, n_layers=2, n_heads=4),
        "SEQ_CLS",
        {"pre_classifier", "classifier"},
    ),
    (tf.T5ForConditionalGeneration, tf.T5Config(**T5), "SEQ_2_SEQ_LM", set()),
    (tf.T5ForSequenceClassification, tf.T5Config(**T5), "SEQ_CLS", {"classification_head"}),
    (tf.BartForSequenceClassification, tf.BartConfig(**BART), "SEQ_CLS", {"classification_head"}),
    (tf.CLIPTextModel, tf.CLIPTextConfig(**TEXT), None, set()),  # hands unknown arguments on, inputs_embeds twice
    (tf.ViTModel, tf.ViTConfig(**VISION), None, set()),
    (tf.ViTForImageClassification, tf.ViTConfig(**VISION), None, {"classifier"}),
    (tf.WhisperForConditionalGeneration, tf.WhisperConfig(**WHISPER), None, set()),
    (tf.WhisperForAudioClassification, tf.WhisperConfig(**WHISPER), None, {"projector", "classifier"}),
]


@pytest.mark.parametrize(("cls", "config", "task", "names"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_heads_and_task_of_a_class(cls, config, task, names):
    model = pack_blocks(cls._from_config(config))
    assert task_type(model) == task
    assert set(heads(model)) == names


def test_a_subclass_has_the_task_of_its_parent():
    class Mine(tf.LlamaForSequenceClassification):
        pass

    model = Mine(tf.LlamaConfig(**TEXT))
    assert task_type(model) == "SEQ_CLS" and set(heads(model)) == {"score"}


def test_a_head_of_ones_own_beside_a_base_model():
    class Mine(tf.PreTrainedModel):
        config_class = tf.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.encoder = tf.BertModel(config)
            self.tagger = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 2))
            self.dropout = nn.Dropout()

        def forward(self, pixels):
            raise NotImplementedError

    model = Mine(tf.BertConfig(**TEXT))
    assert task_type(model) is None and set(heads(model)) == {"tagger"}


def test_a_module_that_is_no_transformers_model_has_neither():
    assert task_type(nn.Linear(2, 2)) is None and heads(nn.Linear(2, 2)) == {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Compressed checkpoints without the heads that the tests load."""
    path = tmp_path_factory.mktemp("saved")
    for name in ("bert-mlm", "llama"):
        compress(tiny.build(name), tiny.settings(), output_dir=path / name)
    return path


def test_what_no_checkpoint_held_belongs_to_the_task(saved):
    model = tf.AutoModelForSequenceClassification.from_pretrained(saved / "bert-mlm", num_labels=3)
    assert set(heads(model)) == {"bert.pooler.dense", "classifier"}


def test_a_head_that_is_new_when_the_model_is_compressed_while_loading(tmp_path):
    tiny.build("bert-mlm").save_pretrained(tmp_path)
    cls = tf.AutoModelForSequenceClassification
    model = cls.from_pretrained(tmp_path, quantization_config=tiny.settings())
    assert set(heads(model)) == {"bert.pooler.dense", "classifier"}


def test_an_output_layer_that_no_checkpoint_held(saved, tmp_path):
    tf.AutoModel.from_pretrained(saved / "llama").save_pretrained(tmp_path)
    assert set(heads(tf.AutoModelForCausalLM.from_pretrained(tmp_path))) == {"lm_head"}


def test_a_loaded_head_is_still_a_head(saved, tmp_path):
    tf.AutoModelForSequenceClassification.from_pretrained(saved / "llama").save_pretrained(tmp_path)
    assert set(heads(tf.AutoModelForSequenceClassification.from_pretrained(tmp_path))) == {"score"}


def test_a_resized_vocabulary_is_no_head(saved):
    model = tf.AutoModelForCausalLM.from_pretrained(saved / "llama")
    assert heads(model) == {}
    model.resize_token_embeddings(120)
    assert heads(model) == {}


def test_compressing_a_loaded_model_makes_no_heads(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert heads(compress(model, tiny.settings())) == {}
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.is_floating_point())
