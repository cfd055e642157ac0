"""A tiny compressed model, and what the tests of PEFT do with it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.integrations.peft.lora_layer import SparseLRLoraLayer
from hf_sparselr.nn.linear import SparseLRLinear

IDS = torch.randint(0, 128, (3, 12), generator=torch.Generator().manual_seed(7))
RANKS = {"layers.0.self_attn.v_proj": 2, "layers.1.mlp.down_proj": 6, "layers.1.self_attn.q_proj": 0}
TARGETS = ["q_proj", "v_proj", "down_proj"]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def compressed_linear(dense: nn.Linear, rank: int, seed: int) -> SparseLRLinear:
    """A random 2:4 S with the given rank and no relation to the dense weight."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = dense.weight.shape
    keep = torch.rand(rows, columns // 4, 4, generator=g).argsort(-1) < 2
    mask = keep.reshape(rows, columns)
    S = torch.randn(rows, columns, generator=g) * 0.1 * mask
    A = torch.randn(rank, columns, generator=g) * 0.1 if rank else None
    B = torch.randn(rows, rank, generator=g) * 0.3 if rank else None
    bias = torch.randn(rows, generator=g) if dense.bias is not None else None
    return SparseLRLinear.from_decomposition(Decomposition(S, mask, A, B), bias)


def compressed_model(
    dtype: torch.dtype = torch.float32, layers: int = 2, ranks: dict[str, int] = RANKS, bias: bool = False
) -> LlamaForCausalLM:
    """A tiny Llama whose linear layers have rank 4, or the rank of the first name in `ranks` they end in."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=layers, mlp_bias=bias, **sizes)
    model = LlamaForCausalLM(config)
    dense = [(name, m) for name, m in model.model.named_modules() if isinstance(m, nn.Linear)]
    for seed, (name, module) in enumerate(dense):
        rank = next((r for end, r in ranks.items() if name.endswith(end)), 4)
        model.model.set_submodule(name, compressed_linear(module, rank, seed))
    return model.to(dtype).eval()


def pack_blocks(model: nn.Module, rank: int = 4) -> nn.Module:
    """Packs, in place, every linear layer below a ModuleList."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{name}." for name in blocks)
    dense = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(inside)]
    for seed, (name, module) in enumerate(dense):
        model.set_submodule(name, compressed_linear(module, rank, seed))
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """The same function from ordinary dense layers, as a reference for what PEFT does to those."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, SparseLRLinear):
            twin.set_submodule(name, layer.to_dense())
    return twin


def additive(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **kwargs})


@torch.no_grad()
def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits


def layers_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """Modules of a class, by their names from "layers." on."""
    return {name[name.find("layers.") :]: m for name, m in model.named_modules() if isinstance(m, kind)}


def lora_layers(model: nn.Module) -> dict[str, SparseLRLoraLayer]:
    return layers_of(model, SparseLRLoraLayer)


def disturb(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Moves an adapter away from its start, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name and "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))


def train(
    model: nn.Module, steps: int = 8, lr: float = 5e-3, autocast: torch.dtype | None = None, **inputs
) -> list[float]:
    """The losses of a few steps; the model is left in training mode."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(input_ids=IDS, labels=IDS, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Copies of mask, values, A, B and bias of all compressed layers."""
    layers = [m for m in model.modules() if isinstance(m, SparseLRLinear)]
    return [parameter.detach().clone() for layer in layers for parameter in layer.parameters()]


def sparse_parts(model: nn.Module) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, SparseLRLinear)]
    return [t.detach().clone() for m in layers for t in (m.mask, m.values)]


def all_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@contextmanager
def dense_weights() -> Iterator[list[SparseLRLinear]]:
    """Collects the layers whose dense weight S + B A is built from what `weight` gives."""
    built, plain = [], SparseLRLinear.weight

    def weight(layer):
        view = plain.fget(layer)
        build = view.build

        def record():
            built.append(layer)
            return build()

        view.build = record
        return view

    def assign(layer, view):  # PEFT's unload gives a layer its own weight back
        pass

    SparseLRLinear.weight = property(weight, assign)
    try:
        yield built
    finally:
        SparseLRLinear.weight = plain


def random_adapter(config: LoraConfig, folder, seed: int = 1, **model_arguments) -> str:
    """The folder of an adapter with random factors, saved from a compressed model."""
    adapted = get_peft_model(compressed_model(**model_arguments), config)
    disturb(adapted, seed=seed)
    adapted.save_pretrained(folder)
    return str(folder)


def load_pair(folders: dict[str, str], **model_arguments) -> tuple[PeftModel, PeftModel]:
    """The adapters, by name, on a compressed model and on its dense twin."""
    model = compressed_model(**model_arguments)
    pair = []
    for base in (model, dense_twin(model)):
        (first, folder), *rest = folders.items()
        adapted = PeftModel.from_pretrained(base, folder, adapter_name=first)
        for name, other in rest:
            adapted.load_adapter(other, adapter_name=name)
        pair.append(adapted.eval())
    return tuple(pair)
