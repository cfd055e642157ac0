"""The test Hub, driven by the real huggingface_hub and transformers clients."""

import json
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath

import pytest
from helpers.hub_server import HubServer, run_client

API_CLIENT = """
import json, os, tempfile
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

def raised(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except HfHubHTTPError as error:
        return type(error).__name__

api = HfApi()
out = {"user": api.whoami()["name"], "created": api.create_repo("me/adapter").repo_id}
out["again"] = api.create_repo("me/adapter", exist_ok=True).repo_id
first = api.upload_file(path_or_fileobj=b"one", path_in_repo="notes/a.txt", repo_id="me/adapter").oid
with tempfile.TemporaryDirectory() as folder:
    for name in ("adapter_config.json", "adapter_model.safetensors", "empty.txt"):
        with open(os.path.join(folder, name), "w") as file:
            file.write("" if name == "empty.txt" else name)
    last = api.upload_folder(folder_path=folder, repo_id="me/adapter").oid
    out["unchanged"] = api.upload_folder(folder_path=folder, repo_id="me/adapter").oid == last
out["head"] = api.model_info("me/adapter").sha == last != first
out["files"] = sorted(api.list_repo_files("me/adapter"))
out["old_files"] = api.list_repo_files("me/adapter", revision=first)
out["top"] = sorted(entry.path for entry in api.list_repo_tree("me/adapter"))
out["exist"] = [api.repo_exists("me/adapter"), api.repo_exists("me/none"), api.repo_exists("none")]
out["file_exist"] = [api.file_exists("me/adapter", name) for name in ("empty.txt", "none.txt")]
snapshot = snapshot_download("me/adapter")
out["snapshot"] = {name: open(os.path.join(snapshot, name)).read() for name in out["files"]}
with open(hf_hub_download("me/planted", "weights.bin"), "rb") as file:
    out["planted"] = file.read().decode()
with tempfile.TemporaryFile() as file:
    file.write(b"pla")
    http_get(f"{api.endpoint}/me/planted/resolve/main/weights.bin", file, resume_size=3, expected_size=7)
    file.seek(0)
    out["resumed"] = file.read().decode()
api.delete_folder("notes", "me/adapter")
api.delete_file("empty.txt", "me/adapter")
out["left"] = sorted(api.list_repo_files("me/adapter"))
out["errors"] = [
    raised(api.model_info, "me/none"),
    raised(hf_hub_download, "me/none", "config.json"),
    raised(hf_hub_download, "me/adapter", "none.txt"),
    raised(hf_hub_download, "me/adapter", "empty.txt", revision="none"),
    raised(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="me/none"),
    raised(HfApi(token=False).create_repo, "me/new"),
]
print(json.dumps(out))
"""

PUSH = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config)
model.push_to_hub("me/llama", max_shard_size="40KB")
core = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "hub": 2}, unk_token="[UNK]"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").push_to_hub("me/llama")
"""

LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer

state = model.state_dict()
loaded = AutoModelForCausalLM.from_pretrained("me/llama", dtype=torch.float32).state_dict()
assert state.keys() == loaded.keys()
assert all(torch.equal(state[name], loaded[name]) for name in state)
assert AutoTokenizer.from_pretrained("me/llama")("hello hub world")["input_ids"] == [1, 2, 0]
"""


def test_files_and_errors_of_the_hub_client(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.repos["me/planted"] = {"weights.bin": b"planted"}
        out = json.loads(run_client(hub, tmp_path, API_CLIENT))
    files = {name: name for name in ("adapter_config.json", "adapter_model.safetensors")}
    before = {**files, "empty.txt": "", "notes/a.txt": "one"}
    assert out["user"] == "me"
    assert out["created"] == out["again"] == "me/adapter"
    assert out["unchanged"] and out["head"]
    assert out["files"] == sorted([*before]) and out["old_files"] == ["notes/a.txt"]
    assert out["top"] == ["adapter_config.json", "adapter_model.safetensors", "empty.txt", "notes"]
    assert out["exist"] == [True, False, False]
    assert out["file_exist"] == [True, False]
    assert out["snapshot"] == before
    assert out["planted"] == out["resumed"] == "planted"
    assert out["left"] == sorted(files)
    assert hub.repos["me/adapter"] == {name: name.encode() for name in files}
    repository, revision, entry = (
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
    )
    assert out["errors"] == [repository, repository, entry, revision, repository, "HfHubHTTPError"]


def test_transformers_model_goes_out_and_comes_back(tmp_path: Path) -> None:
    with HubServer() as hub:
        run_client(hub, tmp_path, PUSH + LOAD)
    files = hub.repos["me/llama"]
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert {"README.md", "config.json", "model.safetensors.index.json", "tokenizer.json"} <= files.keys()
    assert [method for method, path in hub.requests if path.startswith("/lfs/")].count("PUT") == len(shards)
    downloaded = {PurePosixPath(path).name for method, path in hub.requests if method == "GET"}
    assert files.keys() - {"README.md"} <= downloaded


@pytest.mark.parametrize(
    ("wanted", "status", "body"),
    [
        ("bytes=2-", 206, b"cdef"),
        ("bytes=1-2", 206, b"bc"),
        ("bytes=-2", 206, b"ef"),
        ("bytes=9-", 416, None),
    ],
)
def test_range_requests(wanted: str, status: int, body: bytes | None) -> None:
    with HubServer() as hub:
        hub.repos["me/planted"] = {"letters.txt": b"abcdef"}
        url = f"{hub.url}/me/planted/resolve/main/letters.txt"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            reply = opener.open(urllib.request.Request(url, headers={"Range": wanted}))
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            assert reply.status == status
            assert body is None or reply.read() == body
