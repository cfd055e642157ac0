"""A whole checkpoint is checked when it is loaded, dense tensors too, and a save is checked before it counts."""

import json
import re
import shutil

import pytest
import torch
from helpers import checkpoints, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_sparselr import as_peft_model, compress, merge_and_unload, train_mode
from hf_sparselr.entrypoints.inspect import inspect_checkpoint
from hf_sparselr.format.checkpoint import FormatError
from hf_sparselr.format.seal import read_seal, seal
from hf_sparselr.nn.linear import packed_layers

Q = "model.layers.0.self_attn.q_proj"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    checkpoints.compressed().save_pretrained(path)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(path, change) -> None:
    """Changes tensors as somebody does who writes a valid seal."""
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE, metadata={"format": "pt"})
    seal(path, [path / FILE], {})


def load(path, cls=AutoModelForCausalLM, **kwargs):
    return cls.from_pretrained(path, **kwargs)


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"tensor model\.embed_tokens\.weight is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "tensor extra is unexpected: the model has no such tensor"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}),
            r"tensor model\.norm\.weight has dtype I64, expected one of F64, F32, F16, BF16",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.bool)}),
            r"tensor model\.norm\.weight has dtype BOOL",
        ),
    ],
)
def test_dense_tensors_are_checked_against_the_class_that_wrote_them(copied, cls, change, message):
    rewrite(copied, change)
    with pytest.raises(FormatError, match=rf"^{re.escape(str(copied / FILE))}: {message}"):
        load(copied, cls)


def test_a_head_that_is_missing_is_an_error_for_its_own_class_only(copied):
    rewrite(copied, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(FormatError, match=r"lm_head\.weight is missing"):
        load(copied)
    with pytest.raises(FormatError, match=r"lm_head\.weight is missing"):
        load(copied, AutoModel)


def test_other_heads_load_from_a_complete_checkpoint(saved):
    body = load(saved).model
    for cls in (AutoModel, AutoModelForSequenceClassification):
        other = load(saved, cls)
        assert tiny.same(tiny.snapshot(getattr(other, "model", other)), tiny.snapshot(body))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    checkpoints.compressed().save_pretrained(tmp_path, max_shard_size="40KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    tensors, twice = load_file(second), next(iter(load_file(first).items()))
    save_file({**tensors, twice[0]: twice[1]}, second, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"^{re.escape(str(second))}: tensor {twice[0]} is in {first} too"):
        load(tmp_path)


def test_a_mask_must_obey_the_config(copied):
    def swap_bits(tensors):
        mask = tensors[f"{Q}.mask"]
        byte = int(mask[0, 0])  # two of the first four bits, two of the next
        kept = next(bit for bit in range(4, 8) if byte >> bit & 1)
        free = next(bit for bit in range(4) if not byte >> bit & 1)
        mask[0, 0] = byte ^ (1 << kept) ^ (1 << free)

    rewrite(copied, swap_bits)
    with pytest.raises(FormatError, match=rf"{Q}\.mask keeps more than 2 of 4 consecutive inputs"):
        load(copied)


def narrow(tensors):
    tensors[f"{Q}.A"], tensors[f"{Q}.B"] = tensors[f"{Q}.A"][:2].clone(), tensors[f"{Q}.B"][:, :2].clone()


def test_a_rank_must_be_the_configs(copied):
    rewrite(copied, narrow)
    for cls in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(FormatError, match=rf"{Q}\.A has rank 2, but the config says 4"):
            load(copied, cls)


def test_a_config_of_another_rank_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["rank"] = 8
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"\.A has rank 4, but the config says 8"):
        load(copied)


def test_ranks_that_merging_changed_are_saved_and_reload(tmp_path):
    adapted = get_peft_model(
        checkpoints.compressed(), LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights=False)
    )
    merged = merge_and_unload(adapted)
    merged.save_pretrained(tmp_path)
    assert set(read_seal(tmp_path / FILE).ranks.values()) == {7}
    assert tiny.same(tiny.snapshot(load(tmp_path)), tiny.snapshot(merged))
    assert len(packed_layers(load(tmp_path, AutoModel))) == 14


def test_checkpoints_of_another_writer_need_no_seal(copied):
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]["save_id"]
    (copied / "config.json").write_text(json.dumps(config))
    expected = tiny.snapshot(load(copied))
    save_file(load_file(copied / FILE), copied / FILE, metadata={"format": "pt"})
    assert tiny.same(tiny.snapshot(load(copied)), expected)
    with pytest.raises(FormatError, match="has no checksums to verify"):
        inspect_checkpoint(copied, verify=True)


def test_a_config_that_is_saved_alone_still_belongs_to_its_files(copied):
    model = load(copied)
    model.config.save_pretrained(copied)
    load(copied)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(copied)
    model.config.save_pretrained(copied)
    assert tiny.same(tiny.snapshot(load(copied)), tiny.snapshot(model))


def test_inspect_reads_what_transformers_reads(tmp_path):
    checkpoints.compressed(0).save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoints.compressed(1).save_pretrained(tmp_path / "other")
    assert inspect_checkpoint(tmp_path, verify=True).verified
    shutil.copy(tmp_path / "other" / FILE, tmp_path / FILE)
    for read in (load, inspect_checkpoint):
        with pytest.raises(FormatError, match=rf"^{re.escape(str(tmp_path / FILE))}: has save id"):
            read(tmp_path)


def test_inspect_verifies_every_tensor(copied, capsys):
    found = inspect_checkpoint(copied, verify=True)
    assert found.verified and found.save_id == read_seal(copied / FILE).save and "verified" in str(found)
    assert not inspect_checkpoint(copied).verified
    data = bytearray((copied / FILE).read_bytes())
    data[-1] ^= 1
    (copied / FILE).write_bytes(data)
    inspect_checkpoint(copied)
    with pytest.raises(FormatError, match=r"model\.safetensors: tensor \S+ is damaged"):
        inspect_checkpoint(copied, verify=True)


# --- saving ------------------------------------------------------------------------------------------------


def test_saves_that_cannot_be_right_change_nothing(copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    model = as_peft_model(load(copied)).get_base_model()
    with pytest.raises(ValueError, match="has adapters, so this cannot save it"):
        model.save_pretrained(copied)
    with pytest.raises(ValueError, match="distributed_checkpoint=True is not supported"):
        load(copied).save_pretrained(copied, distributed_checkpoint=True)
    with pytest.raises(ValueError, match=r"save_directory='.*model\.safetensors' is a file"):
        load(copied).save_pretrained(copied / FILE)
    state = load(copied).state_dict()
    del state[f"{Q}.mask"]
    with pytest.raises(FormatError, match=rf"{Q}\.mask is missing"):
        load(copied).save_pretrained(copied, state_dict=state)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def _lose_a_value(layer):
    layer.values = torch.nn.Parameter(layer.values[:-1].clone(), requires_grad=False)


def _drop_a_column(layer):
    layer.mask.data[0, 0] &= layer.mask[0, 0] - 1


def _keep_three_of_four(layer):
    layer.mask.data[0, :2] = torch.tensor([0b00110111, 0b00110001], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_lose_a_value, "holds .* values, but the mask keeps"),
        (_drop_a_column, "holds .* values, but the mask keeps"),
        (_keep_three_of_four, "keeps more than 2 of 4 consecutive inputs"),
    ],
)
def test_edits_that_could_not_be_loaded_again_are_not_saved(copied, edit, message):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    model = load(copied)
    edit(model.get_submodule(Q))
    with pytest.raises(FormatError, match=rf"{Q}\.(mask|values) {message}"):
        model.save_pretrained(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_the_trainer_saves_in_one_step_too(copied, tmp_path):
    model = train_mode(load(copied), "factors")
    rows = [{"input_ids": row, "labels": row} for row in tiny.IDS]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    saves = [tmp_path / "out" / f"checkpoint-{step}" for step in (1, 2)]
    assert len({inspect_checkpoint(path, verify=True).save_id for path in saves}) == 2
    assert tiny.same(tiny.snapshot(load(saves[1])), tiny.snapshot(model))
    assert not [path for save in saves for path in save.glob(".*")]


# --- dequantising ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dequantised_model_trains_as_a_dense_one(family, tmp_path):
    compress(tiny.build(family), tiny.settings(), output_dir=tmp_path)
    plain = load(tmp_path).dequantize()
    dense = tiny.build(family)
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in dense.named_parameters()
    }
    plain(input_ids=tiny.IDS, labels=tiny.IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_a_model_is_dequantised_after_it_was_saved(tmp_path):
    model = checkpoints.compressed()
    model.save_pretrained(tmp_path)
    before = tiny.logits(model)
    torch.testing.assert_close(tiny.logits(model.dequantize()), before, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_not_left_behind_by_dequantising():
    adapted = as_peft_model(checkpoints.compressed())
    expected = tiny.logits(adapted)
    with pytest.raises(ValueError, match="has adapters, so this cannot dequantize it"):
        adapted.get_base_model().dequantize()
    assert torch.equal(tiny.logits(adapted), expected)


def test_inspect_says_at_once_that_there_is_nothing(tmp_path):
    for path in (tmp_path / "nothing", "a/b/c", "../nothing"):
        with pytest.raises(FileNotFoundError, match="no such folder, and no Hub id"):
            inspect_checkpoint(path)
