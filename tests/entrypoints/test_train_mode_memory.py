"""Memory of training, counted: its peak against dense LoRA's, and how long anything of a layer's dense size lives."""

import weakref
from collections.abc import Iterable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparselr
from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.format.patterns import parse
from hf_sparselr.nn.linear import SparseLRLinear, packed_layers
from hf_sparselr.utils.precision import multiplies_natively

RANK = 8
TOKENS = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(0))  # activations stay small


class Memory(TorchDispatchMode):
    """Bytes of the storages that are alive: of all, and of those made here that are as large as a dense layer.

    Args:
        held: tensors that are alive from the start (the parameters).
        large: elements from which a storage counts as large.
    """

    def __init__(self, held: Iterable[torch.Tensor], large: int) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.large: dict[int, int] = {}
        self.least, self.peak, self.peak_large = large, 0, 0
        for tensor in held:
            self._add(tensor, self.live)

    def _add(self, tensor: torch.Tensor, sizes: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        sizes[id(storage)] = storage.nbytes()
        weakref.finalize(storage, sizes.pop, id(storage), None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor) or id(leaf.untyped_storage()) in self.live:
                continue
            self._add(leaf, self.live)
            if leaf.untyped_storage().nbytes() >= self.least * leaf.element_size():
                self._add(leaf, self.large)
        self.peak = max(self.peak, sum(self.live.values()))
        self.peak_large = max(self.peak_large, sum(self.large.values()))
        return out


def wide(dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of random 2:4 + rank 8 layers that are large beside its activations."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
    for name, layer in list(model.model.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        weight = layer.weight.detach()
        mask = parse("2:4").mask(weight.abs())
        A, B = torch.randn(RANK, weight.shape[1]) * 0.02, torch.randn(weight.shape[0], RANK) * 0.02
        packed = SparseLRLinear.from_decomposition(Decomposition(weight * mask, mask, A, B))
        model.model.set_submodule(name, packed)
    return model.to(dtype)


def dense_lora(model: nn.Module) -> nn.Module:
    """Ordinary LoRA of the same rank on the same, dense layers."""
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, layer.to_dense())
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def watch(model: nn.Module, large: int) -> Memory:
    """Two steps of training; the optimizer's state is there in the second."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    memory = Memory((*model.parameters(), *model.buffers(), TOKENS), large)
    with memory:
        for _ in range(2):
            loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
            assert not memory.large
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
            assert not memory.large
    return memory


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_of_factors_is_below_dense_lora(dtype: torch.dtype, adapter: bool) -> None:
    model = wide(dtype)
    layers = packed_layers(model).values()
    sizes = [layer.in_features * layer.out_features for layer in layers]
    saved = sum(sizes) * dtype.itemsize - bytes_of(*(t for layer in layers for t in (layer.mask, layer.values)))
    if adapter:  # the base keeps its factors beside the adapter's
        saved -= bytes_of(*(factor for layer in layers for factor in (layer.A, layer.B)))
    model = hf_sparselr.as_peft_model(model) if adapter else hf_sparselr.train_mode(model)
    ours, dense = watch(model, min(sizes)).peak, watch(dense_lora(wide(dtype)), max(sizes) + 1).peak
    unpacked = dtype.itemsize if multiplies_natively(dtype) else dtype.itemsize + 4  # multiplied in FP32
    assert ours <= dense - 0.9 * saved + max(sizes) * unpacked
    assert ours > dense - saved - max(sizes) * dtype.itemsize  # the count misses nothing


@pytest.mark.parametrize("mode", ["factors", "factors+norms", "full", "adapter"])
def test_only_one_layer_at_a_time_is_dense(mode: str) -> None:
    model = wide(torch.float32)
    sizes = [layer.in_features * layer.out_features for layer in packed_layers(model).values()]
    model = hf_sparselr.as_peft_model(model) if mode == "adapter" else hf_sparselr.train_mode(model, mode)
    memory = watch(model, min(sizes))  # which also finds nothing dense after a forward, a backward and a step
    # One layer's S or gradient (4 bytes an entry), and its mask while that is unpacked (1 or 2).
    assert 4 * max(sizes) <= memory.peak_large <= 6 * max(sizes)
