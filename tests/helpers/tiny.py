"""Tiny random models, one a family, and the settings that compress them in a moment."""

import copy
from collections.abc import Callable

import torch
import transformers as tf

from hf_sparselr.config.sparselr_config import SparseLRConfig

from .paths import PYLM

VOCAB = 96
IDS = torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
FAST = {"min_iterations": 10, "max_iterations": 20}

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
_SLIDING = {**_GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}

_MODELS: dict[str, Callable[[], tuple[type, tf.PreTrainedConfig]]] = {
    "llama": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**_GROUPED)),
    "llama-tied": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config(**_SLIDING, use_sliding_window=True),
    ),
    "qwen3": lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**_GROUPED)),
    "mistral": lambda: (tf.MistralForCausalLM, tf.MistralConfig(**_GROUPED, sliding_window=8)),
    "gemma2": lambda: (tf.Gemma2ForCausalLM, tf.Gemma2Config(**_SLIDING)),
    "gemma3": lambda: (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**_SLIDING)),
    "opt": lambda: (
        tf.OPTForCausalLM,
        tf.OPTConfig(**_DECODER, ffn_dim=64, word_embed_proj_dim=32),
    ),
    "phi3": lambda: (tf.Phi3ForCausalLM, tf.Phi3Config(**_DECODER)),
    "neox": lambda: (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**_DECODER)),
    "gpt2": lambda: (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=2),
    ),
    "bert": lambda: (tf.BertModel, tf.BertConfig(**_DECODER)),
    "bert-mlm": lambda: (tf.BertForMaskedLM, tf.BertConfig(**_DECODER)),
    "t5": lambda: (
        tf.T5ForConditionalGeneration,
        tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "mamba": lambda: (
        tf.MambaForCausalLM,
        tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4),
    ),
    "mixtral": lambda: (tf.MixtralForCausalLM, tf.MixtralConfig(**_EXPERTS, num_local_experts=4)),
    "qwen3-moe": lambda: (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=32),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes) -> tf.PreTrainedModel:
    """A model with random weights, the same ones for a name, in eval mode."""
    cls, config = _MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: their initial zeros and ones hide errors
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tokenizer() -> tf.PreTrainedTokenizerBase:
    """A real one with 4096 tokens, and a chat template."""
    result = tf.AutoTokenizer.from_pretrained(PYLM)
    result.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return result


def settings(**changes) -> SparseLRConfig:
    """2:4 and rank 4 on 4 x 32 tokens as they are."""
    fields = {
        "sparsity": "2:4",
        "rank": 4,
        "refine": None,
        "calibration": IDS,
        "num_samples": 4,
        "seq_len": 32,
        "noisy_windows": 0.0,
        "method_options": FAST,
    }
    return SparseLRConfig(**{**fields, **changes})


@torch.no_grad()
def logits(model: tf.PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What a model makes of token ids: logits, or hidden states where it has no head."""
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model(**inputs)[0]


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes and bits (NaN equals NaN)."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def with_bos(tokenizer):
    """A copy of a tokenizer that starts texts with BOS, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer
