"""Card and report beside a checkpoint, and the whole way over the Hub: push, load, push again."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers.hub_server import HubServer, run_client
from huggingface_hub import ModelCard
from peft import LoraConfig

from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.compression.report import FILE_NAME, Report
from hf_sparselr.integrations.hub import model_card as card
from hf_sparselr.integrations.hub.model_card import is_generated
from hf_sparselr.integrations.hub.saving import model_card, write_extras

pytestmark = pytest.mark.xdist_group("hub")  # they share what their fixtures make

FAST = {"min_iterations": 10, "max_iterations": 20}
IDS = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(0))
BASE_CARD = "---\nlicense: apache-2.0\n---\n\n# Base\n"
OWN_CARD = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My words\n"
LAYER = {
    "name": "model.layers.0.mlp.up_proj",
    "shape": [64, 32],
    "pattern": "2:4",
    "rank": 4,
    "sparsity": 0.5,
}


def small_config(**changes) -> SparseLRConfig:
    fields = {
        "sparsity": "2:4",
        "rank": 4,
        "refine": None,
        "num_samples": 4,
        "seq_len": 32,
        "method_options": FAST,
    }
    return SparseLRConfig(**{**fields, "calibration": IDS, **changes})


def full_report(base_model: str | None = "someone/base-1b") -> Report:
    return Report(
        small_config().to_dict(),
        layers=[{**LAYER, "relative_error": 0.0123, "seconds": 1.0}],
        sizes={"dense": 2000, "packed": 1500},
        base_model=base_model,
        base_on_hub=True,
        perplexity={"dense": 10.0, "compressed": 11.25},
        seconds=90.0,
    )


def dense_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(card, "_hub_licence", lambda name: {})


@pytest.fixture
def base(tmp_path) -> Path:
    path = tmp_path / "base"
    dense_model().save_pretrained(path)
    (path / "README.md").write_text(BASE_CARD)
    return path


# -- the card


def test_metadata():
    made = ModelCard(str(model_card(small_config(), full_report(), "me/x", "mit", "LlamaForCausalLM")))
    assert made.data.to_dict() == {
        "base_model": "someone/base-1b",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["sparselr", "compressed", "sparse", "2:4", "low-rank"],
    }


def test_body():
    config = small_config(overrides={"up_proj|gate_proj": {"rank": 2}})
    text = model_card(config, full_report(), "me/x", "mit", "LlamaForCausalLM").text
    for part in (
        "# x\n",
        "only open with the `hf_sparselr` package",
        "pip install hf_sparselr",
        'AutoModelForCausalLM.from_pretrained("me/x")',
        "get_peft_model(model, lora_config(model))",
        r"| Override `up_proj\|gate_proj` |",
        "| packed | 1,500 | 75.0% |",
        "| compressed | 11.250 |",
        "| `model.layers.0.mlp.up_proj` | 64 x 32 | 2:4 | 4 | 50.00% | 0.01230 |",
        "| Time | 1.5 min |",
    ):
        assert part in text


def test_the_card_says_by_which_text_refinement_was_judged():
    report = full_report()
    kept_back = {"calibration": [0.4, 0.25], "self-written": [0.6, 0.5]}
    report.distill = {"losses": [0.3], "loss_before": 0.5, "loss_after": 0.4, "best_pass": 1, "kept_back": kept_back}
    text = model_card(small_config(), report, "me/x", "mit", "LlamaForCausalLM").text
    assert "goes from 0.4000 to 0.2500 on calibration text and 0.6000 to 0.5000 on self-written text" in text


@pytest.mark.parametrize(
    ("coverage", "line"),
    [
        ({"packed": 3, "total": 4, "dense": {"a.b": 1}}, "75% of the linear weights in the blocks are packed. Dense"),
        ({"packed": 4, "total": 4, "dense": {}}, "100% of the linear weights in the blocks are packed."),
        ({"packed": 3, "total": 4, "dense": {"a": "1"}}, ""),
        ({"packed": 5, "total": 4, "dense": {}}, ""),
        ({}, ""),
        ([1], ""),
    ],
)
def test_the_card_says_how_much_is_packed(coverage, line):
    report = full_report()
    report.coverage, report.dense = coverage, {"a.b": "why"}
    text = model_card(small_config(), report, "me/x", "mit", "LlamaForCausalLM").text
    assert (line in text) and ("linear weights in the blocks" in text) == bool(line)
    assert ("Dense stayed a.b (why)." in text) == ("Dense" in line)


def test_card_without_report():
    made = model_card(small_config(rank=0, sparsity=0.5), None)
    assert made.data.tags == ["sparselr", "compressed", "sparse", "unstructured"]
    assert made.data.base_model is None and "base_model_relation" not in made.data.to_dict()
    assert "50% of the entries are zero" in made.text
    for absent in ("## Size", "## Perplexity", "## Layers", "## Fine-tune"):
        assert absent not in made.text


def test_class_without_a_task_is_loaded_by_its_name():
    made = model_card(small_config(), None, architecture="T5ForConditionalGeneration")
    assert made.data.pipeline_tag is None
    assert "from transformers import T5ForConditionalGeneration" in made.text


def test_paths_stay_private(tmp_path):
    config = small_config(calibration=f"file:{tmp_path}/*.txt")
    (tmp_path / "a.txt").write_text("text")
    made = model_card(config, full_report(str(tmp_path)))
    assert made.data.base_model is None
    assert str(tmp_path) not in str(made)
    assert model_card(config, full_report(str(tmp_path / "gone"))).data.base_model is None


def test_licence_fields_of_a_local_base(base):
    assert model_card(small_config(), full_report(str(base))).data.license == "apache-2.0"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    data = model_card(small_config(), full_report(str(base))).data
    assert (data.license, data.license_name, data.license_link) == ("other", "own", "LICENSE")


@pytest.mark.parametrize("content", [None, "no metadata", "---\n[broken\n---\n"])
def test_base_without_a_licence(tmp_path, content):
    if content is not None:
        (tmp_path / "README.md").write_text(content)
    assert model_card(small_config(), full_report(str(tmp_path))).data.license is None


def test_edits_are_noticed():
    text = str(model_card(small_config(), full_report(), "me/x", "mit"))
    assert is_generated(ModelCard(text))
    assert is_generated(ModelCard(text.replace("\n", "\r\n")))
    assert is_generated(ModelCard(text.replace("tags:\n", "tags:\n- more\n")))
    assert not is_generated(ModelCard(text + "\nA remark.\n"))
    assert not is_generated(ModelCard(text.replace("license: mit", "license: apache-2.0")))
    assert not is_generated(ModelCard(OWN_CARD))


# -- beside a checkpoint


def test_save_pretrained_writes_card_and_report(base, tmp_path):
    model = compress(base, small_config(), output_dir=tmp_path / "out")
    made = ModelCard.load(tmp_path / "out" / "README.md")
    assert is_generated(made)
    assert (made.data.license, made.data.pipeline_tag) == ("apache-2.0", "text-generation")
    stored = Report.load(tmp_path / "out")
    assert stored.layers == model.sparselr_report.layers
    assert stored.base_model is None and model.sparselr_report.base_model == str(base)
    assert str(base) not in str(made)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.sparselr_report.perplexity = {"compressed": 12.5}
    loaded.save_pretrained(tmp_path / "again")
    again = ModelCard.load(tmp_path / "again" / "README.md")
    assert again.data.license == "apache-2.0" and "12.500" in again.text
    assert Report.load(tmp_path / "again").perplexity == {"compressed": 12.5}


def test_own_card_stays(tmp_path):
    model = compress(dense_model(), small_config())
    (tmp_path / "README.md").write_text(OWN_CARD)
    model.save_pretrained(tmp_path)
    kept = ModelCard.load(tmp_path / "README.md")
    assert kept.text == ModelCard(OWN_CARD).text and kept.data.license == "mit"
    assert kept.data.tags == ["mine", "sparselr", "compressed", "sparse", "2:4", "low-rank"]
    (tmp_path / "README.md").write_text("---\n[broken\n---\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "---\n[broken\n---\n"


def test_generated_card_is_updated_and_keeps_added_tags(tmp_path):
    model = compress(dense_model(), small_config())
    model.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("tags:\n", "tags:\n- more\n"))
    model.sparselr_report.perplexity = {"compressed": 12.5}
    write_extras(model, tmp_path)
    made = ModelCard.load(readme)
    assert "12.500" in made.text and "more" in made.data.tags and is_generated(made)
    before = readme.read_text()
    model.sparselr_report = None
    write_extras(model, tmp_path)
    assert readme.read_text() == before


def test_other_saves_write_nothing(tmp_path):
    compressed = compress(dense_model(), small_config())
    compressed.save_pretrained(tmp_path / "worker", is_main_process=False)
    compressed.add_adapter(LoraConfig(target_modules=["q_proj"]))
    compressed.save_pretrained(tmp_path / "adapter")
    dense_model().save_pretrained(tmp_path / "dense")
    for name in ("worker", "adapter", "dense"):
        assert not {"README.md", FILE_NAME} & {path.name for path in (tmp_path / name).iterdir()}


# -- over HTTP

RESHARDED = """
import hf_sparselr, torch, transformers
from pathlib import Path

folder = Path({folder!r})
ids = torch.load(folder / "ids.pt")
config = hf_sparselr.SparseLRConfig(
    sparsity="2:4", rank=4, refine=None, calibration=ids, num_samples=4, seq_len=32
)
model = transformers.AutoModelForCausalLM.from_pretrained("me/base", quantization_config=config)
model.push_to_hub("me/again")
with torch.no_grad():
    model.lm_head.weight.add_(1)
model.save_pretrained(folder / "local", push_to_hub=True, repo_id="me/again", max_shard_size="8KB")
with torch.no_grad():
    expected = model(ids).logits
    for name in ("me/again", folder / "local"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(name)
        print(torch.equal(loaded(ids).logits, expected))
"""


FIRST = """
import hf_sparselr, torch, transformers
from pathlib import Path

folder = Path({folder!r})
ids = torch.load(folder / "ids.pt")
config = hf_sparselr.SparseLRConfig(
    sparsity="2:4", rank=4, refine=None, calibration=ids, num_samples=4, seq_len=32
)
model = hf_sparselr.compress(folder / "base", config).eval()
with torch.no_grad():
    torch.save(model(ids).logits, folder / "logits.pt")
model.push_to_hub("me/x", tags=["extra"])
model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="me/sharded", max_shard_size="8KB")
transformers.AutoModelForCausalLM.from_pretrained(folder / "base").push_to_hub("me/dense")
"""

SECOND = """
import hf_sparselr, torch, transformers
from pathlib import Path

folder = Path({folder!r})
ids, expected = torch.load(folder / "ids.pt"), torch.load(folder / "logits.pt")
for name in ("me/x", "me/sharded"):
    model = transformers.AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        print(torch.equal(model(ids).logits, expected))
    model.push_to_hub(name)
model.push_to_hub("me/copy")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[HubServer, Path]:
    folder = tmp_path_factory.mktemp("published")
    dense_model().save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text(BASE_CARD)
    torch.save(IDS, folder / "ids.pt")
    with HubServer() as hub:
        run_client(hub, folder / "first", FIRST.format(folder=str(folder)))
        yield hub, folder


def hub_card(hub: HubServer, name: str) -> ModelCard:
    return ModelCard(hub.repos[name]["README.md"].decode())


def test_push_uploads_card_and_report(published):
    hub, folder = published
    assert {"config.json", "model.safetensors", "README.md", FILE_NAME} <= set(hub.repos["me/x"])
    assert sum(name.endswith(".safetensors") for name in hub.repos["me/sharded"]) > 1
    for name in ("me/x", "me/sharded"):
        made = hub_card(hub, name)
        assert is_generated(made)
        assert (made.data.license, made.data.library_name) == ("apache-2.0", "transformers")
        assert f'from_pretrained("{name}")' in made.text
        assert len(json.loads(hub.repos[name][FILE_NAME])["layers"]) == 14
        assert not any(str(folder).encode() in data for data in hub.repos[name].values())
    assert "extra" in hub_card(hub, "me/x").data.tags
    assert (folder / "saved" / "README.md").read_bytes() == hub.repos["me/sharded"]["README.md"]
    assert "sparselr" not in hub_card(hub, "me/dense").content and FILE_NAME not in hub.repos["me/dense"]


def test_load_from_the_hub_and_push_again(published):
    hub, folder = published
    generated, report = hub_card(hub, "me/sharded"), hub.repos["me/sharded"][FILE_NAME]
    edited = hub_card(hub, "me/x").content.replace("# x", "# My title")
    hub.repos["me/x"]["README.md"] = edited.encode()

    out = run_client(hub, folder / "second", SECOND.format(folder=str(folder)))

    assert out.split() == ["True", "True"]
    assert hub_card(hub, "me/x").content == edited
    assert hub_card(hub, "me/sharded").content == generated.content
    copy = hub_card(hub, "me/copy")
    assert copy.text.count("| `model.layers.") == 14 and copy.data.license == "apache-2.0"
    assert hub.repos["me/copy"][FILE_NAME] == report


def test_a_push_removes_old_weight_files_and_links_a_base_from_the_hub(tmp_path):
    dense_model().save_pretrained(tmp_path / "base")
    torch.save(IDS, tmp_path / "ids.pt")
    with HubServer() as hub:
        hub.repos["me/base"] = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
        hub.repos["me/again"] = {"pytorch_model.bin": b"dense", "notes.txt": b"mine"}
        out = run_client(hub, tmp_path / "client", RESHARDED.format(folder=str(tmp_path)))
    assert out.split() == ["True", "True"]
    files = set(hub.repos["me/again"])
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert {"pytorch_model.bin", "notes.txt"} <= files
    assert {path.name for path in (tmp_path / "local").iterdir()} == files - {
        "pytorch_model.bin",
        "notes.txt",
    }
    card = hub_card(hub, "me/again")
    assert (card.data.base_model, card.data.base_model_relation) == ("me/base", "quantized")
    assert json.loads(hub.repos["me/again"][FILE_NAME])["base_model"] == "me/base"


# -- what others wrote


def test_text_from_a_report_does_nothing_in_a_card():
    evil = "<script>x</script> | ![a](http://x/y.png)\n# Title\n`code` *b* _c_ [l](http://z)"
    row = {**LAYER, "name": evil, "pattern": evil, "shape": [evil], "rank": evil, "relative_error": evil}
    report = Report(
        small_config().to_dict(),
        layers=[row, {}],
        sizes={evil: 3},
        perplexity={evil: 1.5},
        allocation={"x": evil},
        base_model=evil,
        base_on_hub=True,
        from_file=True,
    )
    report.settings["allocation"] = evil
    text = model_card(small_config(overrides={"up_proj|`<b>": {"rank": 2}}), report, "me/x").text
    outside = re.sub(r"`[^`\n]*`", "", text.replace("\\`", ""))  # without code spans
    assert "<script" not in outside and "<b>" not in outside and "# Title" not in outside.splitlines()
    assert not re.search(r"(?<!\\)\]\(http://", outside)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 7) for line in rows)


def test_a_report_in_a_checkpoint_makes_nobody_read_or_ask(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(card, "_hub_licence", lambda name: asked.append(name) or {})
    compress(dense_model(), small_config(), output_dir=tmp_path / "out")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "README.md").write_text("---\nlicense: secret\n---\n")
    for base in (str(secret), "someone/else"):
        stored = json.loads((tmp_path / "out" / FILE_NAME).read_text())
        (tmp_path / "out" / FILE_NAME).write_text(json.dumps({**stored, "base_model": base}))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        loaded.save_pretrained(tmp_path / "again")
        made = ModelCard.load(tmp_path / "again" / "README.md")
        assert made.data.license is None and "secret" not in str(made)
    assert asked == []


def test_a_base_is_linked_only_if_it_was_loaded_from_the_hub(tmp_path, monkeypatch):
    model = dense_model()
    model.config.name_or_path = "someone/base-1b"  # a name, or a folder that was there
    compress(model, small_config()).save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_text() + (tmp_path / FILE_NAME).read_text()
    assert "someone" not in written


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"layers": [{}], "settings": {}, "later": 1, "sizes": {"dense": 0}}',
        '{"sizes": {"dense": null, "packed": 1e999}, "perplexity": {"dense": null}}',
        r'{"layers": [{"name": "\ud800", "pattern": "\ud800"}], "perplexity": {"\udfff": 1}}',
    ],
)
def test_a_broken_report_stops_neither_loading_nor_saving(tmp_path, text):
    model = compress(dense_model(), small_config(), output_dir=tmp_path / "out")
    (tmp_path / "out" / FILE_NAME).write_text(text)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_card_beside_the_checkpoint_that_is_not_on_the_hub_stays(tmp_path):
    model = compress(dense_model(), small_config(), output_dir=tmp_path)
    (tmp_path / "README.md").write_text(OWN_CARD)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert "My words" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))
