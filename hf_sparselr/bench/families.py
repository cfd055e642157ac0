"""Trains small models of several architectures on the same text, as subjects of `bench quality`.

    hf-sparselr bench families --teacher books-22m --text "file:train/*.txt" --output DIR

Each model has the teacher's tokenizer and vocabulary, learns the text and the teacher's predictions on it, in equal
parts, and is saved in BF16 to DIR/NAME. Minutes a model on a GPU. A second run leaves those that are there. Where the
device has deterministic kernels, the same arguments give the same model; the printed checksum tells.
"""

import argparse
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from ..data.sources import read_files
from ..utils.determinism import deterministic_kernels
from .measures import token_windows

# Shapes of `hidden` columns and `layers` blocks: learned positions and ReLU, parallel branches, sliding windows with
# norms around each branch, normed queries and keys, Conv1D, a state-space model.
FAMILIES: dict[str, Callable[[int, int, dict[str, Any]], PretrainedConfig]] = {
    "opt": lambda hidden, layers, common: transformers.OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        ffn_dim=4 * hidden,
        num_attention_heads=4,
        dropout=0.0,
        **common,
    ),
    "gpt-neox": lambda hidden, layers, common: transformers.GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=4 * hidden,
        num_attention_heads=4,
        tie_word_embeddings=True,
        **common,
    ),
    "gemma3": lambda hidden, layers, common: transformers.Gemma3TextConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=3 * hidden,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=hidden // 4,
        query_pre_attn_scalar=hidden // 4,
        sliding_window=128,
        **common,
    ),
    "qwen3": lambda hidden, layers, common: transformers.Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=3 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        tie_word_embeddings=True,
        **common,
    ),
    "gpt2": lambda hidden, layers, common: transformers.GPT2Config(
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        n_positions=common["max_position_embeddings"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **{name: value for name, value in common.items() if name != "max_position_embeddings"},
    ),
    "mamba2": lambda hidden, layers, common: transformers.Mamba2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        head_dim=32,
        num_heads=hidden // 16,
        state_size=32,
        n_groups=1,
        chunk_size=32,  # without kernels of its own, memory grows with it
        tie_word_embeddings=True,
        use_cache=False,
        **{name: value for name, value in common.items() if name != "max_position_embeddings"},
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="a Hub id or a directory of a causal language model")
    parser.add_argument("--text", required=True, metavar="file:GLOB")
    parser.add_argument(
        "--families", nargs="+", default=["opt", "gpt-neox", "gemma3", "qwen3", "mamba2"], choices=FAMILIES
    )
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=48, help="windows in a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", metavar="DIR", required=True)


def run(args: argparse.Namespace) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).to(args.device).eval()
    windows = token_windows(read_files(args.text, f"--text {args.text}"), tokenizer, args.seq_len)
    for name in args.families:
        folder = Path(args.output) / name
        if (folder / "config.json").exists():
            continue
        model, loss = reproducibly(lambda name=name: trained(name, teacher, windows, args))
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(parameter.numel() for parameter in model.parameters())
        known = _checksum(model)
        print(f"{name}: {size / 1e6:.1f} M parameters, checksum {known:08x}, last loss {loss:.3f}", flush=True)


def reproducibly(train: Callable[[], Any]) -> Any:
    """The result of train() with deterministic kernels; where an operator has none, of a second, less strict call.

    Attention takes its deterministic kernels only where operators without one are errors.
    """
    try:
        with deterministic_kernels():
            return train()
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
    with deterministic_kernels(warn_only=True):
        return train()


def _checksum(model: torch.nn.Module) -> int:
    """The CRC-32 of the parameters of a model in BF16."""
    total = 0
    for parameter in model.parameters():
        total = zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data, total)
    return total


def trained(
    name: str, teacher: torch.nn.Module, windows: torch.Tensor, args: argparse.Namespace
) -> tuple[transformers.PreTrainedModel, float]:
    """A model of a family, trained on windows (count, length) of token ids, and its last loss."""
    own = teacher.config
    common = {
        "vocab_size": own.vocab_size,
        "bos_token_id": own.bos_token_id,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
        "max_position_embeddings": 2 * args.seq_len,
    }
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](args.hidden, args.layers, common), dtype=torch.float32)
    model.to(args.device).train()
    generator = torch.Generator().manual_seed(args.seed)
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    decays = (0.1, 0.0)
    rates = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)]
    optimizer = torch.optim.AdamW(rates, lr=args.lr, betas=(0.9, 0.95), fused=args.device != "cpu")
    warm = max(1, args.steps // 10)
    loss = torch.zeros(())
    for step in range(args.steps):
        share = min(1.0, (step + 1) / warm) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share
        chosen = torch.randint(len(windows), (args.batch_size,), generator=generator)
        loss = _loss(model, teacher, windows[chosen].to(args.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval(), float(loss.detach())


def _loss(model: torch.nn.Module, teacher: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Half the loss on the next tokens, half the divergence from the teacher's predictions, in nats a token."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
    own, theirs = (F.log_softmax(each.float().flatten(0, 1), -1) for each in (logits, target))
    next_tokens = F.nll_loss(own, ids[:, 1:].flatten())
    return 0.5 * next_tokens + 0.5 * F.kl_div(own, theirs, log_target=True, reduction="batchmean")
