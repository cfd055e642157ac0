"""An engine's side of loading packed layers, and layers to load."""

import torch
from torch import nn

from hf_sparselr.format.decomposition import Decomposition
from hf_sparselr.nn.linear import SparseLRLinear


class Engine:
    """How vLLM's layers load a dense weight on one of several ranks, in the few lines that matter.

    Args:
        sizes: rows of each layer behind the merged one, on this rank. None: row parallel.
    """

    def __init__(self, rank: int, sizes: dict | None, replicas: dict | None = None, world: int = 1) -> None:
        self.rank, self.sizes, self.replicas, self.world = rank, sizes, replicas or {}, world

    def load(self, parameter: nn.Parameter, tensor: torch.Tensor, shard=None) -> None:
        if self.sizes is None:
            if hasattr(parameter, "input_dim"):
                width = parameter.data.shape[parameter.input_dim]
                tensor = tensor.narrow(parameter.input_dim, self.rank * width, width)
            parameter.data.copy_(tensor)
        elif shard is None:  # fused in the file
            offset = 0
            for name, size in self.sizes.items():
                whole = size * self.world // self.replicas.get(name, 1)
                self.load(parameter, tensor.narrow(parameter.output_dim, offset, whole), name)
                offset += whole
        else:
            names = list(self.sizes)
            start = sum(self.sizes[name] for name in names[: names.index(shard)])
            size = self.sizes[shard]
            place = parameter.data.narrow(parameter.output_dim, start, size)
            first = self.rank // self.replicas.get(shard, 1) * size
            place.copy_(tensor.narrow(parameter.output_dim, first, size))


def packed_layer(outs, ins, rank=4, pattern=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(outs, ins, generator=generator)
    if pattern == "2:4":
        mask = (
            torch.zeros(outs, ins // 4, 4)
            .scatter(2, S.view(outs, -1, 4).abs().topk(2).indices, 1)
            .bool()
            .view(outs, ins)
        )
    else:
        mask = torch.rand(outs, ins, generator=generator) < pattern
    A = torch.randn(rank, ins, generator=generator) if rank else None
    B = torch.randn(outs, rank, generator=generator) if rank else None
    return SparseLRLinear.from_decomposition(Decomposition(S * mask, mask, A, B, {}))


def tensors(packed):
    names = ("A", "B", "mask", "values")  # the order of the files
    return {name: getattr(packed, name).data for name in names if getattr(packed, name) is not None}


def feed(shards, packed, shard=None):
    for part, tensor in tensors(packed).items():
        shards.load(part, tensor, shard)
    shards.load("weight", torch.zeros(0), shard)
