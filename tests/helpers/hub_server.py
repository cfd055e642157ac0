"""A small Hugging Face Hub on 127.0.0.1: the real clients publish to it and load from it over HTTP.

It serves model repositories with one branch, `main`, kept in memory. A commit is named by a hash of its
files, so that a test may also fill `HubServer.repos` by hand. Xet is not served; plain Git LFS is.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

from .subprocesses import fork

USER = "me"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".model", ".parquet", ".png")
REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"
OVERRIDDEN_VARIABLES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")


@dataclass
class Request:
    query: dict[str, list[str]]
    headers: Message
    body: bytes


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer other than success; the client chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        named = {"X-Error-Code": code} if code else {}
        self.reply = Reply(json.dumps({"error": message}).encode(), status, {**named, **(headers or {})})


def _json_reply(content: Any, status: int = 200) -> Reply:
    return Reply(json.dumps(content).encode(), status, {"Content-Type": "application/json"})


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(path: str, data: bytes) -> str:
    """What the client compares with its own file to leave out unchanged ones."""
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_oid(data)


def _tree_entry(files: dict[str, bytes], path: str) -> dict[str, Any]:
    if path not in files:
        return {"type": "directory", "path": path, "size": 0, "oid": _git_oid(path.encode())}
    data = files[path]
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": _oid(path, data), "size": len(data), "pointerSize": 134}
    return entry


def _sliced(reply: Reply, wanted: str) -> Reply:
    """The part of a file that a Range header asks for."""
    size = len(reply.body)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if match is None:
        return reply
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    headers = {**reply.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return Reply(reply.body[start:stop], 206, headers)


class HubServer:
    """`with HubServer() as hub:` serves until the block ends."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self._commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self._lfs: dict[str, bytes] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, request: Request) -> Reply:
        self.requests.append((method, unquote(path)))
        line = f"{method.replace('HEAD', 'GET')} {path}"
        try:
            for pattern, handler in ROUTES.items():
                if match := re.fullmatch(pattern, line):
                    values = {name: unquote(value or "") for name, value in match.groupdict().items()}
                    return handler(self, request, **values)
            raise HubError(404, f"The test Hub does not serve {line}")
        except HubError as error:
            return error.reply
        except (KeyError, TypeError, ValueError) as error:
            # Not a 500: the client would repeat the same request for a while.
            return HubError(400, f"Malformed request: {error!r}").reply

    def commit_hash(self, repo: str) -> str:
        if repo not in self.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        files = dict(self.repos[repo])
        listing = json.dumps([repo, sorted((path, _git_oid(data)) for path, data in files.items())])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self._commits.setdefault((repo, sha), files)
        return sha

    def _checkout(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        head = self.commit_hash(repo)
        sha = head if revision == "main" else revision
        if (repo, sha) not in self._commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self._commits[repo, sha]

    def _whoami(self, request: Request) -> Reply:
        _require_token(request)
        return _json_reply({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def _create_repo(self, request: Request) -> Reply:
        _require_token(request)
        asked = json.loads(request.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        status = 409 if repo in self.repos else 200
        self.repos.setdefault(repo, {})
        return _json_reply({"url": f"{self.url}/{repo}", "name": repo}, status)

    def _preupload(self, request: Request, repo: str, revision: str) -> Reply:
        _, present = self._checkout(repo, revision)
        files = []
        for path in (asked["path"] for asked in json.loads(request.body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = _oid(path, present[path]) if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json_reply({"files": files})

    def _lfs_batch(self, request: Request, repo: str) -> Reply:
        self.commit_hash(repo)
        objects = []
        for asked in json.loads(request.body)["objects"]:
            oid, href = asked["oid"], {"href": f"{self.url}/lfs/{asked['oid']}"}
            missing = {} if oid in self._lfs else {"actions": {"upload": href, "verify": href}}
            objects.append({"oid": oid, "size": asked["size"], **missing})
        return _json_reply({"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Request, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The uploaded bytes do not have the announced hash")
        self._lfs[oid] = request.body
        return Reply()

    def _lfs_verify(self, request: Request, oid: str) -> Reply:
        if len(self._lfs.get(oid, b"")) != json.loads(request.body)["size"]:
            raise HubError(422, "The object was not uploaded")
        return Reply()

    def _commit(self, request: Request, repo: str, revision: str) -> Reply:
        _require_token(request)
        if revision != "main":
            raise HubError(404, f"Not a branch: {revision}", "RevisionNotFound")
        files = dict(self._checkout(repo, revision)[1])
        for operation in map(json.loads, request.body.splitlines()):
            self._apply(files, operation["key"], operation["value"])
        self.repos[repo] = files
        sha = self.commit_hash(repo)
        return _json_reply({"commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"})

    def _apply(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self._lfs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]
        elif key != "header":
            raise ValueError(f"unknown operation {key}")

    def _info(self, request: Request, repo: str, revision: str = "main") -> Reply:
        sha, files = self._checkout(repo, revision)
        siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(files.items())]
        info = {"id": repo, "author": repo.split("/")[0], "sha": sha, "private": False, "tags": []}
        return _json_reply({**info, "siblings": siblings})

    def _tree(self, request: Request, repo: str, revision: str, path: str) -> Reply:
        _, files = self._checkout(repo, revision)
        prefix = f"{path}/" if path else ""
        inside = {name for name in files if name.startswith(prefix)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        parents = {folder.as_posix() for name in inside for folder in PurePosixPath(name).parents}
        names = inside | {folder for folder in parents - {"."} if folder.startswith(prefix)}
        if request.query.get("recursive", ["false"])[0].lower() != "true":
            names = {name for name in names if "/" not in name.removeprefix(prefix)}
        return _json_reply([_tree_entry(files, name) for name in sorted(names)])

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Reply:
        sha, files = self._checkout(repo, revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        data = files[path]
        headers["ETag"] = f'"{_oid(path, data)}"'
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
        return _sliced(Reply(data, 200, headers), request.headers.get("Range", ""))


def _require_token(request: Request) -> None:
    if not request.headers.get("Authorization", "").startswith("Bearer "):
        raise HubError(401, "Invalid username or password.")


ROUTES: dict[str, Callable[..., Reply]] = {
    r"GET /api/whoami-v2": HubServer._whoami,
    r"POST /api/validate-yaml": lambda hub, request: _json_reply({"errors": [], "warnings": []}),
    r"POST /api/repos/create": HubServer._create_repo,
    rf"POST /api/models/{REPO}/preupload/{REVISION}": HubServer._preupload,
    rf"POST /api/models/{REPO}/commit/{REVISION}": HubServer._commit,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": HubServer._lfs_batch,
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": HubServer._lfs_put,
    r"POST /lfs/(?P<oid>[0-9a-f]{64})": HubServer._lfs_verify,
    rf"GET /api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?": HubServer._tree,
    rf"GET /api/models/{REPO}/revision/{REVISION}": HubServer._info,
    rf"GET /api/models/{REPO}": HubServer._info,
    rf"GET /{REPO}/resolve/{REVISION}/(?P<path>.+)": HubServer._resolve,
}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.hub.answer(self.command, path, Request(parse_qs(query), self.headers, body))
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - the names http.server calls

    def log_message(self, format: str, *args: object) -> None:
        """Requests are kept in `HubServer.requests`, not printed."""


def client_env(server: HubServer, cache_dir: Path | str) -> dict[str, str]:
    """Environment of a client process. The Hub libraries read it once, when they are imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OVERRIDDEN_VARIABLES)}
    return {
        **kept,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache_dir),
        "HF_TOKEN": "hf_test",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        **{f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")},
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
    }


def run_client(server: HubServer, cache_dir: Path | str, code: str) -> str:
    """What `code` prints in a Python process of its own that takes `server` for the Hub."""
    done = fork(code, client_env(server, cache_dir), Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout
