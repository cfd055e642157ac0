import inspect
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_server import HubServer, run_client
from helpers.paths import PYLM, ROOT
from helpers.subprocesses import check
from helpers.tiny import build
from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparselr
from hf_sparselr import cli
from hf_sparselr.config.fields import FIELDS
from hf_sparselr.config.sparselr_config import SparseLRConfig
from hf_sparselr.entrypoints.compress import compress
from hf_sparselr.entrypoints.inspect import inspect_checkpoint
from hf_sparselr.entrypoints.perplexity import perplexity
from hf_sparselr.integrations.hub.rights import check_push_rights

SOLVER = '{"min_iterations": 5, "max_iterations": 10}'
SMALL = ["--num-samples", "4", "--seq-len", "32", "--rank", "4", "--method-options", SOLVER]
LAYERS = 14


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny dense model with a tokenizer in `dense`, texts in `text.txt`, a compressed one in `packed`."""
    home = tmp_path_factory.mktemp("cli")
    build("llama", torch.bfloat16, vocab_size=4096, bos_token_id=0, eos_token_id=0).save_pretrained(home / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PYLM / name, home / "dense")
    (home / "text.txt").write_text("\n".join(f"def f{i}(x): return x + {i}" for i in range(60)), encoding="utf-8")
    assert cli.main(compress_args(home, "packed", "--refine", "none")) == 0
    return home


def compress_args(home: Path, output: str, *options: str) -> list[str]:
    data = ["--output", str(home / output), "--calibration", f"file:{home}/*.txt"]
    return ["compress", str(home / "dense"), *data, *SMALL, *options]


def payload(file: Path) -> dict[str, int]:
    """Bytes of every tensor in a safetensors file, from the tensors themselves."""
    with safe_open(file, framework="pt") as reader:
        return {name: reader.get_tensor(name).nbytes for name in reader.keys()}  # noqa: SIM118


def test_compress_writes_and_tells(home, capsys):
    tm = '{"passes": 1}'
    overrides = r'{"mlp\\.up_proj": {"sparsity": 0.25, "rank": 0}}'
    args = compress_args(home, "tm", "--sparsity", "0.5", "--tm", tm, "--overrides", overrides, "--seed", "3")
    assert cli.main([*args, "--ignore", "o_proj", "k_proj", "--dtype", "float32", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "model.layers.0.mlp.up_proj: relative error" in err
    assert "transformer matching took" in err
    report = AutoModelForCausalLM.from_pretrained(home / "tm").sparselr_report
    assert str(report) in out
    assert f"{report.sizes['dense']:,} bytes dense, {report.sizes['packed']:,} packed" in out
    assert len(report.layers) == LAYERS - 4
    settings = inspect_checkpoint(home / "tm").settings
    assert (settings["sparsity"], settings["seed"], settings["tm"]["passes"]) == (0.5, 3, 1)
    assert settings["damping"] == list(SparseLRConfig().damping)
    assert {layer["dtype"] for layer in inspect_checkpoint(home / "tm").layers} == {"F32"}


def test_compress_to_a_budget_with_an_allocation(home, capsys):
    options = ["--compression", "0.5", "--rank-ratio", "0.1", "--allocation", "global", "--refine", "none"]
    trial = ["--allocation-options", '{"iterations": 2, "spread": 0.05}']
    args = compress_args(home, "budget", *options, *trial)
    rank = args.index("--rank")
    assert cli.main(args[:rank] + args[rank + 2 :]) == 0
    out = capsys.readouterr().out
    found = inspect_checkpoint(home / "budget")
    kept = sum(layer["nonzeros"] + layer["rank"] * sum(layer["shape"]) for layer in found.layers)
    assert f"{kept:,} parameters kept" in out
    assert kept <= sum(math.prod(layer["shape"]) for layer in found.layers) / 2
    assert {layer["pattern"] for layer in found.layers} == {f"{layer['zeros']:g}" for layer in found.layers}
    assert (found.settings["compression"], found.settings["rank_ratio"]) == (0.5, 0.1)
    assert (found.settings["sparsity"], found.settings["allocation_options"]["spread"]) == (None, 0.05)


def test_compress_with_an_effort_and_distillation(home, capsys):
    distill = '{"passes": 1, "self_samples": 2, "self_len": 8}'
    options = ["--refine", "tm+distill", "--effort", "fast", "--tm", '{"passes": 1}', "--distill", distill]
    assert cli.main(compress_args(home, "distilled", *options)) == 0
    assert "distillation took the divergence" in capsys.readouterr().err
    found = inspect_checkpoint(home / "distilled").settings
    expected = SparseLRConfig(effort="fast", refine="tm+distill").to_dict()
    assert (found["effort"], found["refine"]) == ("fast", "tm+distill")
    assert found["distill"] == {**expected["distill"], **json.loads(distill)}
    assert found["method_options"] == {**expected["method_options"], **json.loads(SOLVER)}
    assert found["tm"] == {**expected["tm"], "passes": 1}
    assert AutoModelForCausalLM.from_pretrained(home / "distilled").sparselr_report.distill["passes"] <= 1


def test_compress_leaves_logging_alone(home, capsys):
    logger = logging.getLogger("hf_sparselr")
    before = (logger.level, list(logger.handlers))
    assert cli.main(compress_args(home, "none", "--targets", "nothing")) == 2
    assert (logger.level, list(logger.handlers)) == before
    assert capsys.readouterr().err.startswith("hf-sparselr: error: ")


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_eval(home, capsys, name):
    path, data = str(home / name), f"file:{home}/*.txt"
    capsys.readouterr()
    args = ["eval", path, "--data", data, "--seq-len", "32", "--stride", "16", "--device", "cpu"]
    assert cli.main([*args, "--dtype", "float32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = perplexity(model, data, AutoTokenizer.from_pretrained(path), seq_len=32, stride=16)
    assert result["perplexity"] == pytest.approx(expected)
    assert (result["model"], result["data"], result["stride"]) == (path, data, 16)
    assert cli.main([*args, "--dtype", "float32"]) == 0
    assert f"perplexity {expected:.4f} on {data}" in capsys.readouterr().out


def test_inspect_counts_the_bytes_of_the_files(home, capsys):
    capsys.readouterr()
    assert cli.main(["inspect", str(home / "packed"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes, dense = (payload(home / name / "model.safetensors") for name in ("packed", "dense"))
    assert found["totals"]["model"] == {"packed": sum(sizes.values()), "dense": sum(dense.values())}
    assert found["format_version"] == 1
    assert found["settings"]["rank"] == 4
    assert len(found["layers"]) == LAYERS
    for layer in found["layers"]:
        own = [size for name, size in sizes.items() if name.startswith(f"{layer['name']}.")]
        assert layer["bytes"] == sum(own)
        assert layer["dense_bytes"] == dense[f"{layer['name']}.weight"] == 2 * math.prod(layer["shape"])
        assert (layer["pattern"], layer["zeros"], layer["rank"], layer["dtype"]) == ("2:4", 0.5, 4, "BF16")
        assert layer["nonzeros"] == math.prod(layer["shape"]) // 2


def test_inspect_prints_tables(home, capsys):
    capsys.readouterr()
    assert cli.main(["inspect", str(home / "packed")]) == 0
    out = capsys.readouterr().out
    assert 'sparsity: "2:4"' in out
    assert "model.layers.1.mlp.down_proj" in out
    assert "100% of the linear weights in the blocks are packed\n" in out
    assert f"{inspect_checkpoint(home / 'packed').totals['model']['packed']:,}" in out


def test_inspect_says_how_much_is_packed_and_what_is_not(tmp_path, capsys):
    config = SparseLRConfig(
        sparsity="2:4",
        rank=2,
        refine=None,
        targets=["q_proj", "up_proj"],
        calibration=torch.arange(64).view(4, 16),
        num_samples=4,
        seq_len=16,
        method_options=json.loads(SOLVER),
    )
    compress(build("llama"), config).save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    packed = sum(math.prod(layer["shape"]) for layer in found.layers)
    assert found.coverage["packed"] == packed
    assert found.coverage["total"] == packed + sum(found.coverage["dense"].values())
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"warning: only {packed / found.coverage['total']:.0%} of the linear weights" in out
    assert "dense stayed model.layers.0.mlp.gate_proj" in out
    (tmp_path / "sparselr_report.json").unlink()
    assert inspect_checkpoint(tmp_path).coverage is None


def test_inspect_reads_shards_and_finds_shapes_without_factors(home, tmp_path):
    changes = {"vocab_size": 4096, "intermediate_size": 51, "attention_bias": True, "bos_token_id": 0}
    dense = build("llama", **changes)
    shapes = {name: list(p.shape) for name, p in dense.named_parameters() if p.ndim == 2 and "layers" in name}
    config = SparseLRConfig(
        sparsity=0.3,
        rank=0,
        refine=None,
        calibration=torch.arange(64).view(4, 16),
        num_samples=4,
        seq_len=16,
        method_options=json.loads(SOLVER),
    )
    compress(dense, config).save_pretrained(tmp_path, max_shard_size="100KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    found = inspect_checkpoint(tmp_path)
    assert {f"{layer['name']}.weight": layer["shape"] for layer in found.layers} == shapes
    assert found.totals["model"]["packed"] == sum(sum(payload(file).values()) for file in files)
    files[0].unlink()
    with pytest.raises(ValueError, match=rf"{files[0].name} is missing"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "{home}/dense"], "no quantization_config, expected quant_method='sparselr'"),
        (["inspect", "{home}"], "config.json"),
        (["inspect", "no/such/thing"], "no/such/thing"),
        (
            ["inspect", "me/missing"],
            "'me/missing' is no folder, and its config.json cannot be read from the Hub",
        ),
        (["eval", "{home}/dense", "--data", "file:{home}/*.none"], "matches no file"),
        (["eval", "{home}/dense", "--data", "file:{home}/*.txt", "--stride", "99"], "stride=99: expected"),
        (["eval", "{home}/none"], "none' is no folder"),
        (["eval", "{home}/dense", "--device", "abacus"], "device='abacus': cannot be used here"),
        (["compress", "{home}/packed", "--output", "{home}/x"], "already quantised (sparselr)"),
        (["compress", "{home}/dense", "--output", "{home}/x", "--rank", "-1"], "rank=-1: expected"),
        (
            ["compress", "{home}/dense", "--output", "{home}/x", "--sparsity", "lots"],
            "sparsity='lots': expected",
        ),
        (
            ["compress", "{home}/dense", "--output", "{home}/x", "--compression", "0.5", "--sparsity", "2:4"],
            "compression=0.5 contradicts sparsity='2:4'",
        ),
        (
            ["compress", "{home}/dense", "--output", "{home}/x", "--allocation", "owl"],
            "allocation='owl' chooses each block's sparsity, which sparsity='2:4' fixes",
        ),
        (["compress", "{home}/dense", "--output", "{home}/x", "--tm", "{"], "tm='{': expected a JSON object"),
        (
            ["compress", "{home}/dense", "--output", "{home}/x", "--tm", '{"pases": 1}'],
            "did you mean 'passes'",
        ),
        (
            ["compress", "{home}/dense", "--output", "{home}/x", "--distill", '{"passes": 0}'],
            "distill.passes=0: expected an integer >= 1",
        ),
        (
            ["compress", "{home}/dense", "--output", "{home}/x", "--device", "abacus"],
            "device='abacus': cannot",
        ),
    ],
)
def test_errors_are_one_line(home, capsys, args, message):
    capsys.readouterr()
    assert cli.main([arg.replace("{home}", str(home)) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]  # before it, transformers may warn
    assert last.startswith("hf-sparselr: error: ") and message in last
    assert "Traceback" not in err
    assert not (home / "x").exists()


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["compress", "name"],
        ["compress", "name", "--output", "x", "--effort", "lazy"],
        ["compress", "name", "--output", "x", "--refine", "distill+tm"],
        ["eval", "name", "--dtype", "int8"],
        ["shrink"],
    ],
)
def test_unknown_arguments(capsys, args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(args)
    assert exit_.value.code == 2
    assert "usage: hf-sparselr" in capsys.readouterr().err


def test_every_field_is_an_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compress", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert (f"--{name.replace('_', '-')} " in shown) is field.on_command_line
        assert not field.on_command_line or field.help in shown
    assert f"(default: {SparseLRConfig().num_samples})" in shown
    assert "precomputed" not in shown


def test_help_of_eval_shows_the_defaults_of_perplexity(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    defaults = inspect.signature(perplexity).parameters
    assert f"the model's context (default: {defaults['seq_len'].default})" in shown
    assert f"windows at a time (default: {defaults['batch_size'].default})" in shown


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--help"], 0, "compress"),
        (["--version"], 0, hf_sparselr.__version__),
        (["compress", "--help"], 0, "--rank-ratio"),
        (["eval", "--help"], 0, "--stride"),
        (["bench", "--help"], 0, "kernels"),
        (["compress", "x", "--output", "y", "--rank", "many"], 2, "argument --rank: invalid int value"),
        (["compress", "x", "--output", "y", "--rank", "-1"], 2, "rank=-1: expected an integer in 0..1048576"),
        (["compress", "x", "--output", "y", "--tm", "{"], 2, "tm='{': expected a JSON object"),
        (["compress", "x", "--output", "y", "--ignore", "("], 2, "ignore='(': not a regular expression"),
        (["compress", "no/such/thing", "--output", "y"], 2, "'no/such/thing' is no folder, and no Hub id"),
        (["inspect", "./missing"], 2, "'./missing' is no folder, and no Hub id either"),
        (["eval", "/missing"], 2, "'/missing' is no folder"),
        (["eval", ".", "--data", "file:*.none"], 2, "data='file:*.none' matches no file"),
        (["eval", ".", "--seq-len", "1"], 2, "seq_len=1: expected an integer >= 2"),
    ],
)
def test_answers_without_importing_torch(args, code, words, tmp_path):
    script = f"""
import sys
from hf_sparselr.cli import main
try:
    code = main({args!r})
except SystemExit as exit_:
    code = exit_.code
assert code == {code}, code
heavy = {{"torch", "transformers", "numpy", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = check(script, ROOT, cwd=tmp_path)
    assert words in result.stdout + result.stderr


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "hf_sparselr", "--version"]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, f"hf-sparselr {hf_sparselr.__version__}\n")


def test_push_and_inspect_on_the_hub(home, tmp_path):
    args = compress_args(home, "pushed", "--refine", "none", "--push", "me/tiny")
    code = f"from hf_sparselr.cli import main; assert main({args!r}) == 0; assert main(['inspect', 'me/tiny']) == 0"
    with HubServer() as server:
        out = run_client(server, tmp_path, code)
    assert "pushed to me/tiny" in out
    assert str(inspect_checkpoint(home / "pushed").totals["model"]["packed"]) in out.replace(",", "")


def test_revision_and_trust_reach_the_loaders(home, tmp_path):
    """The second commit of the model has another vocabulary, and no tokenizer."""
    first = {file.name: file.read_bytes() for file in (home / "dense").iterdir()}
    with HubServer() as server:
        server.repos["me/dense"] = first
        commit = server.commit_hash("me/dense")
        broken = {**json.loads(first["config.json"]), "vocab_size": 7}
        kept = {name: data for name, data in first.items() if "tokenizer" not in name}
        server.repos["me/dense"] = {**kept, "config.json": json.dumps(broken).encode()}
        loading = ["--revision", commit, "--trust-remote-code"]
        data = f"file:{home}/*.txt"
        args = compress_args(home, "revised", "--refine", "none", *loading)
        args[1] = "me/dense"
        code = f"""
from hf_sparselr.cli import main
assert main({args!r}) == 0
assert main({["eval", "me/dense", "--data", data, "--seq-len", "32", "--device", "cpu", *loading]!r}) == 0
"""
        assert "perplexity" in run_client(server, tmp_path, code)
    assert inspect_checkpoint(home / "revised").settings["rank"] == 4


@pytest.mark.parametrize(
    ("user", "repo_id", "message"),
    [
        ({"name": "me"}, "me/tiny", None),
        ({"name": "me"}, "tiny", None),
        ({"name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}]}, "lab/tiny", None),
        ({"name": "me", "auth": {"accessToken": {"role": "fineGrained"}}}, "lab/tiny", None),
        ({"name": "me", "auth": {"accessToken": {"role": "read"}}}, "me/tiny", "may only read"),
        ({"name": "me"}, "lab/tiny", "push='lab/tiny': expected a repository of me,"),
        ({"name": "me", "orgs": [{"name": "lab", "roleInOrg": "read"}]}, "lab/tiny", "a repository of me,"),
        ({"name": "me"}, "a/b/c", "Repo id must be"),
    ],
)
def test_rights_to_push_are_checked_first(home, capsys, monkeypatch, user, repo_id, message):
    monkeypatch.setattr(HfApi, "whoami", lambda self: user)
    if message is None:
        check_push_rights(repo_id)
        return
    assert cli.main(compress_args(home, "unwritten", "--push", repo_id)) == 2
    assert message in capsys.readouterr().err
    assert not (home / "unwritten").exists()
