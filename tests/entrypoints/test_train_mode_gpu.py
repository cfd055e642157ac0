"""Training on a GPU: peak memory against dense LoRA, mixed precision, and sharding through accelerate."""

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparselr
from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.format.patterns import parse
from hf_sparselr.integrations.transformers.sharding import FSDP2_TORCH
from hf_sparselr.nn.linear import SparseLRLinear, packed_layers

pytestmark = pytest.mark.gpu

RANK = 16
IDS = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))


def build(dtype: torch.dtype, hidden: int = 1024, blocks: int = 8) -> LlamaForCausalLM:
    """A Llama on the GPU whose layers are random 2:4 + rank 16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 8}
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=blocks, **sizes)).to(dtype)
        for name, layer in list(model.model.named_modules()):
            if not isinstance(layer, nn.Linear):
                continue
            weight = layer.weight.detach()
            mask = parse("2:4").mask(weight.abs().float())
            A, B = torch.randn(RANK, weight.shape[1]) * 0.02, torch.randn(weight.shape[0], RANK) * 0.02
            packed = SparseLRLinear.from_decomposition(Decomposition(weight * mask, mask, A, B), dtype=dtype)
            model.model.set_submodule(name, packed)
    return model


def dense_lora(dtype: torch.dtype) -> nn.Module:
    model = build(dtype)
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, layer.to_dense())
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def train(model: nn.Module, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, ids = [], IDS.cuda()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def peak(make) -> int:
    """Bytes at the peak of two steps of a new model, beyond what was allocated before it."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = make()
    train(model, 1)  # kernels are compiled, workspaces and scratch are there
    torch.cuda.reset_peak_memory_stats()
    train(model, 2)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_of_factors_is_below_dense_lora(dtype, adapter):
    prepare = hf_sparselr.as_peft_model if adapter else hf_sparselr.train_mode
    # Once, before the peaks: cuBLAS takes its workspace, and the fastest plans are measured.
    train(prepare(build(dtype)), 1)
    layers = packed_layers(build(dtype)).values()
    sizes = [layer.in_features * layer.out_features * dtype.itemsize for layer in layers]
    kept = [t for layer in layers for t in (layer.mask, layer.values)]
    if adapter:  # the base keeps its factors beside the adapter's
        kept += [factor for layer in layers for factor in (layer.A, layer.B)]
    saved = sum(sizes) - sum(t.numel() * t.element_size() for t in kept)
    del layers, kept
    ours = peak(lambda: prepare(build(dtype)))
    dense = peak(lambda: dense_lora(dtype))
    assert ours <= dense - 0.9 * saved + max(sizes)


@pytest.mark.parametrize("kernel", ["auto", "packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_own_factors_as_an_adapter_start_at_the_same_bits(dtype, kernel, tokens):
    model, ids = build(dtype, hidden=256, blocks=2).eval(), IDS[:1, :tokens].cuda()
    for layer in packed_layers(model).values():
        layer.kernel = kernel
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        adapted = hf_sparselr.as_peft_model(model).eval()
        assert torch.equal(adapted(input_ids=ids).logits, expected)
        with adapted.disable_adapter():
            assert torch.equal(adapted(input_ids=ids).logits, expected)
        assert torch.equal(adapted.merge_and_unload()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["factors", "factors+norms", "full"])
def test_every_mode_trains_in_mixed_precision(mode, checkpointing):
    model = hf_sparselr.train_mode(build(torch.float32, hidden=256, blocks=2), mode)
    masks = {name: layer.mask.clone() for name, layer in packed_layers(model).items()}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cuda", torch.bfloat16):
        losses = train(model, 8)
    assert losses[-1] < losses[0]
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.mask, masks[name]) and layer.mask.grad is None
        assert layer.values.requires_grad == (mode == "full")


def sharded(version: int) -> None:
    """Run in a process of its own: accelerate's FSDP over the GPUs of this launch."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
    model = hf_sparselr.train_mode(build(torch.float32, hidden=256, blocks=2), "full")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert type(model).__name__.startswith("FSDP") and losses[-1] < losses[0]
    state = accelerator.get_state_dict(model)
    assert {tensor.dtype for name, tensor in state.items() if name.endswith(".mask")} <= {torch.uint8}


def launch(version: int) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(hf_sparselr.__file__).parents[1])
    one = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, __file__, str(version)],
        env={**os.environ, **one, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_fsdp2_trains_through_accelerate_or_names_the_torch_it_needs():
    result = launch(2)
    if torch.__version__ >= FSDP2_TORCH:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode != 0
        assert f"FSDP2 with packed layers needs torch >= {FSDP2_TORCH}" in result.stderr


def test_fsdp1_is_refused():
    result = launch(1)
    assert result.returncode != 0
    assert "FSDP1 is not supported for packed layers" in result.stderr


if __name__ == "__main__":
    sharded(int(sys.argv[1]))
