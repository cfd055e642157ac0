"""What experts see: their Gram matrices against those of a brute-force pass over the router's choices."""

import pytest
import torch
from helpers import tiny
from torch import nn

from hf_sparselr.compression.activations import Workplace
from hf_sparselr.compression.capture import Call
from hf_sparselr.compression.experts import compressible_layers, one_expert_at_a_time, unfuse_experts
from hf_sparselr.compression.layer_inputs import LayerGroup, grams_of_experts

PLACE = Workplace(torch.device("cpu"), torch.device("cpu"), torch.float32, "fp32")


def brute_force(block: nn.Module, hidden: list[torch.Tensor], masks: list[torch.Tensor]) -> dict:
    """{stack: {expert: (X^T X, rows)}} of a Mixtral block's experts, dense and fused."""
    experts, found = block.mlp.experts, {"gate_up_proj": {}, "down_proj": {}}

    def note(module: nn.Module, args: tuple) -> None:
        x, index, weights = args
        real = masks.pop(0).flatten()
        for expert in range(module.num_experts):
            rows = [(t, weights[t, k]) for t in range(len(x)) for k in range(index.shape[1])
                    if index[t, k] == expert and real[t]]  # fmt: skip
            inner = []
            for token, weight in rows:
                gate, up = (module.gate_up_proj[expert] @ x[token]).chunk(2)
                inner.append(weight * module.act_fn(gate) * up)
            for key, given in (("gate_up_proj", [x[token] for token, _ in rows]), ("down_proj", inner)):
                X = torch.stack(given) if given else torch.zeros(0, getattr(module, key).shape[2])
                gram, count = found[key].get(expert, (0, 0))
                found[key][expert] = gram + X.T @ X, count + len(X)

    handle = experts.register_forward_pre_hook(note)
    for batch in hidden:
        block.mlp(batch)
    handle.remove()
    return found


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_grams_of_routed_tokens(padded: bool) -> None:
    model = tiny.build("mixtral")
    block = model.model.layers[0]
    hidden = [torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    masks = [torch.ones(2, 6, dtype=torch.bool) for _ in hidden]
    if padded:
        masks[0][1, 4:] = masks[1][0, :3] = False
    found = brute_force(block, hidden, list(masks))
    unfuse_experts(model, [name for name in compressible_layers(model) if "experts" in name])
    calls = [Call((), {}, None, (mask,) if padded else ()) for mask in masks]
    for key, width in (("gate_up_proj", 32), ("down_proj", 64)):
        group = LayerGroup([f"experts.{key}.{expert}" for expert in range(4)], False, experts=True)
        with one_expert_at_a_time(model):
            grams = list(grams_of_experts(block.mlp, group, hidden, calls, PLACE))
        total = sum(count for _, count in found[key].values())
        mean = sum(gram for gram, _ in found[key].values()) / total
        for expert, (_, gram, tokens, share) in enumerate(grams):
            own, count = found[key][expert]
            assert tokens == count and share == count / total
            torch.testing.assert_close(gram, own + width * mean, atol=1e-4, rtol=1e-4)
