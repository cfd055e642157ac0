import logging

import pytest
import torch
from helpers import tiny
from torch import nn

from hf_sparselr.compression.capture import capture_block_inputs, replay
from hf_sparselr.compression.model_structure import find_stacks, linear_layers
from hf_sparselr.compression.plan import plan_layers
from hf_sparselr.data.model_inputs import make_batches, token_samples
from hf_sparselr.format.patterns import NM, Unstructured
from hf_sparselr.utils.modules import move_to_device

# family: (stacks, linear layers in them)
STACKS = {
    "llama": (["model.layers"], 14),
    "qwen2": (["model.layers"], 14),
    "qwen3": (["model.layers"], 14),
    "mistral": (["model.layers"], 14),
    "gemma2": (["model.layers"], 14),
    "gemma3": (["model.layers"], 14),
    "opt": (["model.decoder.layers"], 12),
    "phi3": (["model.layers"], 8),
    "neox": (["gpt_neox.layers"], 8),
    "gpt2": (["transformer.h"], 8),
    "bert": (["encoder.layer"], 12),
    "bert-mlm": (["bert.encoder.layer"], 12),
    "t5": (["encoder.block", "decoder.block"], 32),
    "mamba": (["backbone.layers"], 8),
    "mixtral": (["model.layers"], 8),
    "qwen3-moe": (["model.layers"], 8),
}


@pytest.mark.parametrize("name", STACKS)
def test_blocks_and_layers_are_found(name):
    model = tiny.build(name)
    stacks, count = STACKS[name]
    assert list(find_stacks(model)) == stacks
    assert all(len(blocks) == 2 for blocks in find_stacks(model).values())
    layers = linear_layers(model)
    assert len(layers) == count
    assert all(name.startswith(tuple(f"{stack}." for stack in stacks)) for name in layers)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no transformer blocks"):
        find_stacks(nn.Sequential(nn.Linear(4, 4)))


def dense_outputs(model, blocks, batches):
    """outputs[block][batch] of an ordinary forward pass."""
    outputs = [[] for _ in blocks]

    def keep(index):
        return lambda module, args, out: outputs[index].append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    for batch in batches:
        tiny.logits(model, batch)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("batch_size", [1, 3])  # 3: T5 unpacks a bare tensor of batch 3 without an error
@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_replay_is_exact(name, batch_size):
    model = tiny.build(name)
    batches = make_batches(token_samples(tiny.IDS), batch_size)
    for blocks in find_stacks(model).values():
        recording = capture_block_inputs(model, blocks, batches)
        hidden = recording.inputs
        outputs_of = dense_outputs(model, list(blocks.values()), [batch["input_ids"] for batch in batches])
        for (name, block), outputs in zip(blocks.items(), outputs_of, strict=True):
            calls = recording.calls[name]
            hidden = [replay(block, batch, call) for batch, call in zip(hidden, calls, strict=True)]
            assert all(map(torch.equal, hidden, outputs)), name


def test_batches_share_the_arguments_that_are_equal():
    model = tiny.build("llama")
    (blocks,) = find_stacks(model).values()
    recording = capture_block_inputs(model, blocks, make_batches(token_samples(tiny.IDS), 2))
    tensors = {id(call.kwargs["position_embeddings"][0]) for calls in recording.calls.values() for call in calls}
    assert len(recording.inputs) > 1 and len(tensors) == 1
    moved = move_to_device(next(iter(recording.calls.values())), torch.device("cpu"))
    assert {id(call.kwargs["position_embeddings"][0]) for call in moved} == tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "opt", "t5"])
def test_recording_leaves_the_model_alone(name, dtype):
    model = tiny.build(name, dtype)
    before = tiny.snapshot(model)
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    own = next(iter(next(iter(find_stacks(model).values())).values()))
    marked = own.forward = own.forward  # an instance forward, as accelerate sets one
    for blocks in find_stacks(model).values():
        recording = capture_block_inputs(model, blocks, make_batches(token_samples(tiny.IDS), 2))
        assert all(batch.dtype == torch.float32 for batch in recording.inputs)
    assert tiny.same(before, tiny.snapshot(model))
    assert tiny.same(buffers, dict(model.named_buffers()))
    assert vars(own).pop("forward") is marked
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_failing_forward_pass_leaves_the_model_alone():
    model = tiny.build("llama", torch.bfloat16)
    before = tiny.snapshot(model)
    blocks = find_stacks(model)["model.layers"]
    with pytest.raises(IndexError):
        capture_block_inputs(model, blocks, [{"input_ids": torch.full((1, 4), tiny.VOCAB)}])
    assert tiny.same(before, tiny.snapshot(model))
    assert not any("forward" in vars(module) for module in model.modules())


# --- plan_layers -------------------------------------------------------------------------------------------


def plan(name="llama", **changes):
    with torch.device("meta"):
        model = tiny.build(name)
    return plan_layers(model, tiny.settings(**changes))


def test_plan_needs_no_weights_and_leaves_the_head_dense():
    planned = plan()
    assert len(planned) == 14 and "lm_head" not in planned
    layer = planned["model.layers.1.mlp.down_proj"]
    assert (layer.name, layer.pattern, layer.rank) == ("model.layers.1.mlp.down_proj", NM(2, 4), 4)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"targets": ["mlp.*"]}, 6),
        ({"targets": ["q_proj", "v_proj"]}, 4),
        ({"targets": [r"model\.layers\.0\..*"]}, 7),
        ({"ignore": ["down_proj"]}, 12),
        ({"ignore": ["mlp"]}, 8),
        ({"targets": ["mlp"]}, 6),
        ({"targets": ["mlp"], "ignore": [r"layers\.0"]}, 3),
        ({"overrides": {"self_attn": {"skip": True}}}, 6),
        ({"ignore": ["down_proj", "lm_head"]}, 12),
        ({"targets": ["mlp.*"], "ignore": ["layers.0.*"]}, 3),
        ({"overrides": {"self_attn.*": {"skip": True}}}, 6),
    ],
)
def test_targets_and_ignore(changes, kept):
    assert len(plan(**changes)) == kept


def test_the_first_matching_override_wins():
    planned = plan(overrides={"q_proj": {"rank": 0}, "self_attn.*": {"sparsity": 0.5, "rank": 2}})
    found = {name.split(".")[-1]: (layer.pattern, layer.rank) for name, layer in planned.items()}
    assert found["q_proj"] == (NM(2, 4), 0)
    assert found["k_proj"] == (Unstructured(0.5), 2)
    assert found["up_proj"] == (NM(2, 4), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["query"]}, r"targets: 'query' matches no layer; layers are model\.layers\.0\."),
        ({"targets": ["proj"]}, r"targets: 'proj' matches no layer"),  # whole components, not substrings
        ({"targets": ["lm_head"]}, r"targets: 'lm_head' matches no layer"),
        ({"overrides": {"fc9": {"rank": 2}}}, r"overrides: 'fc9' matches no layer.*q_proj.*\(14 in all\)"),
        ({"ignore": ["fc9"]}, r"ignore: 'fc9' matches no module; layers are"),
        ({"ignore": [".*"]}, r"leave no layer to compress; layers are model\.layers\.0"),
        (
            {"rank": 64, "on_incompatible": "skip"},
            r"no layer can be compressed: model\.layers\.0.*q_proj: rank=64 must",
        ),
        ({"sparsity": "2:5"}, r"0\.self_attn\.q_proj: its 32 inputs.*'2:5' \(and 13 more layers\).*\"skip\""),
        ({"rank": 16}, r"0\.self_attn\.k_proj: rank=16 must be smaller.*16 x 32.*on_incompatible=\"skip\""),
    ],
)
def test_plan_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_incompatible_layers_can_be_skipped_with_one_warning():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("hf_sparselr")
    logger.addHandler(handler)
    try:
        planned = plan(rank=16, on_incompatible="skip")
    finally:
        logger.removeHandler(handler)
    assert len(planned) == 10 and not any("k_proj" in name for name in planned)
    (record,) = records
    assert "4 layers stay dense: model.layers.0.self_attn.k_proj" in record.getMessage()


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_layers(name):
    found = plan(name)
    assert len(found) == 8 + 2 * 2 * 4  # two blocks with two stacks of four experts
    assert "model.layers.1.mlp.experts.down_proj.3" in found
    assert len(plan(name, ignore=["experts"])) == 8
