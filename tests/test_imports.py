"""What importing the package, torch and transformers does to one another; every test is a process of its own."""

import ast
import importlib

import pytest
from helpers import tiny
from helpers.paths import ROOT
from helpers.subprocesses import check

import hf_sparselr
from hf_sparselr import compress

pytestmark = pytest.mark.xdist_group("imports")  # they share what their fixtures make

AUTOLOAD = "from hf_sparselr.integrations.autoload import autoload; autoload()\n"
REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from hf_sparselr.config.sparselr_config import SparseLRConfig
from hf_sparselr.integrations.transformers.quantizer import SparseLRQuantizer
assert AUTO_QUANTIZER_MAPPING["sparselr"] is SparseLRQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["sparselr"] is SparseLRConfig
"""


def test_the_package_imports_only_the_standard_library(tmp_path):
    code = """
import sys
before = set(sys.modules)
import hf_sparselr
hf_sparselr.integrations.autoload.autoload()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new <= {"hf_sparselr"} | sys.stdlib_module_names, new
assert set(dir(hf_sparselr)) >= {"SparseLRConfig", "compress", "lora_config", "as_peft_model", "__version__"}
try:
    hf_sparselr.absent
except AttributeError as error:
    assert "hf_sparselr" in str(error) and "absent" in str(error)
"""
    check(code, ROOT, cwd=tmp_path)


def test_type_checkers_see_every_public_name():
    """They read the imports that never run."""
    tree = ast.parse((ROOT / "hf_sparselr" / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].asname]
    seen = {node.names[0].asname: (node.module, node.names[0].name) for node in imports}
    del seen["_autoload"]
    assert {*seen, "__version__"} == set(hf_sparselr.__all__)
    for name, (module, inside) in seen.items():
        assert getattr(hf_sparselr, name) is getattr(importlib.import_module(f"hf_sparselr.{module}"), inside)


def test_import_torch_stays_as_light_as_it_was(tmp_path):
    code = f"""
import sys
{AUTOLOAD}
import torch
torch.zeros(1)
assert not {{"transformers", "peft", "hf_sparselr.config.sparselr_config", "hf_sparselr.nn.linear"}} & set(sys.modules)
"""
    check(code, ROOT, cwd=tmp_path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    model = compress(tiny.build("llama"), tiny.settings(), output_dir=path / "single")
    model.save_pretrained(path / "shards", max_shard_size="10KB")
    assert len(list((path / "shards").glob("*.safetensors"))) > 1
    return path


def test_a_packed_checkpoint_loads_without_importing_the_package(checkpoints, tmp_path):
    code = f"""
{AUTOLOAD}
import torch
from transformers import AutoModelForCausalLM
for name in ("single", "shards"):
    model = AutoModelForCausalLM.from_pretrained({str(checkpoints)!r} + "/" + name)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "SparseLRLinear"
    assert model(torch.arange(8)[None]).logits.isfinite().all()
"""
    check(code, ROOT, cwd=tmp_path, torch_imported=True)


def test_loading_a_packed_checkpoint_imports_no_solver(checkpoints, tmp_path):
    code = f"""
{AUTOLOAD}
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(checkpoints)!r} + "/single")
model(torch.arange(8)[None])
model.save_pretrained("again")
allowed = {{"registry"}}
loaded = {{name.split(".")[2] for name in sys.modules if name.startswith("hf_sparselr.solvers.")}}
assert loaded <= allowed, loaded
assert model.hf_quantizer.quantization_config.method_options.form == "one-product"
assert "hf_sparselr.solvers.threebasil" in sys.modules
"""
    check(code, ROOT, cwd=tmp_path, torch_imported=True)


def test_a_packed_checkpoint_is_refused_without_the_package(checkpoints, tmp_path):
    code = f"""
import sys
from transformers import AutoModelForCausalLM
for name in ("single", "shards"):
    try:
        AutoModelForCausalLM.from_pretrained({str(checkpoints)!r} + "/" + name)
    except Exception as error:
        assert "size" in str(error), error
    else:
        raise AssertionError(f"{{name}} was loaded")
assert not any(name.startswith("hf_sparselr") for name in sys.modules)
"""
    check(code, cwd=tmp_path, torch_imported=True)


@pytest.mark.parametrize(
    "first",
    [
        "from hf_sparselr.config.sparselr_config import SparseLRConfig",
        "import hf_sparselr.compression.plan",
        "import transformers, hf_sparselr",
        "from hf_sparselr import SparseLRLinear, compress, lora_config",
    ],
)
def test_every_import_order_registers(first, tmp_path):
    result = check(f"{first}\n{REGISTERED}", ROOT, cwd=tmp_path, torch_imported=True)
    assert "could not register" not in result.stderr


@pytest.mark.parametrize("first", ["import peft, hf_sparselr", AUTOLOAD + "import peft"])
def test_peft_is_extended_in_either_order(first, tmp_path):
    code = f"""
{first}
import torch
from peft import LoraConfig, get_peft_model
from hf_sparselr.nn.linear import SparseLRLinear
layer = torch.nn.Sequential(SparseLRLinear(8, 8, nonzeros=0, rank=2))
try:
    get_peft_model(layer, LoraConfig(target_modules=["0"], use_dora=True))
except ValueError as error:
    assert "use_dora" in str(error)
else:
    raise AssertionError("PEFT's own call was not checked")
{REGISTERED}
"""
    assert "could not register" not in check(code, ROOT, cwd=tmp_path, torch_imported=True).stderr


@pytest.mark.parametrize("host", ["transformers.quantizers", "transformers.quantizers.auto", "peft"])
def test_a_host_that_imports_torch_first_is_registered_with(host, tmp_path):
    """The entry point then runs in the middle of the host's own import."""
    distribution = tmp_path / "entry-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: entry\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text(
        "[torch.backends]\nentry = hf_sparselr.integrations.autoload:autoload\n"
    )
    code = f"""
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
assert "torch" not in sys.modules
import {host}
assert "hf_sparselr.config.sparselr_config" in sys.modules
{REGISTERED}
"""
    assert "could not register" not in check(code, ROOT, tmp_path, cwd=tmp_path).stderr


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_import_torch_survives_broken_hosts(error, tmp_path):
    for host in ("transformers", "peft"):
        (tmp_path / host).mkdir()
        (tmp_path / host / "__init__.py").write_text(f"raise {error}('broken on purpose')\n")
    code = f"""
{AUTOLOAD}
import torch
torch.zeros(1)
for host in ("transformers", "transformers.quantizers", "peft"):
    try:
        __import__(host)
    except {error} as error:
        assert "broken on purpose" in str(error)
    else:
        raise AssertionError(host)
import hf_sparselr
"""
    check(code, tmp_path, ROOT, cwd=tmp_path)


def test_broken_glue_leaves_transformers_usable(tmp_path):
    code = f"""
{AUTOLOAD}
import sys
sys.modules["hf_sparselr.nn.linear"] = None  # importing it raises ImportError
import transformers.quantizers
from transformers import LlamaConfig
"""
    assert (
        "could not register itself with transformers.quantizers"
        in check(code, ROOT, cwd=tmp_path, torch_imported=True).stderr
    )
