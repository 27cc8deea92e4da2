"""A small hub on loopback that huggingface_hub talks to unchanged: model repositories, plain LFS.

>>> with HubServer() as hub:
...     hub.repos["ann/model"].files()

Large files (`.safetensors`) go through LFS, the others in the commit, as on the real one. Xet,
which the real one prefers, is not spoken: clients have HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
"""Tokens: of ann, who may write; of ann, to read alone; of bob."""
USERS = {WRITER: ("ann", "write"), READER: ("ann", "read"), STRANGER: ("bob", "write")}
BLOCK = 1 << 14
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+))?)?$")


@dataclass
class Repo:
    """Commits, oldest first, and the branches that name them."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Put a whole state behind a branch; gives its name."""
        before = self.branches.get(branch, "")
        listed = sorted((path, hashlib.sha256(held).hexdigest()) for path, held in files.items())
        oid = hashlib.sha1(json.dumps([before, len(self.commits), listed]).encode()).hexdigest()
        self.commits.append((oid, files))
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a branch, or by its name."""
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == oid), None)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """What is on a branch."""
        found = self.at(branch)
        assert found is not None
        return found[1]


class HubServer:
    """Serves from the moment it is made to `close`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """Large files that came whole, by their hash."""
        self.requests: list[str] = []
        """Method and path of each request, in order."""
        self.received: list[int] = []
        """Bytes of each upload of a large file, cut off ones too."""
        self.drop_after: int | None = None
        """Cut the connection of every upload after so many bytes."""
        self.slow_seconds = 0.0
        """Wait so long for each block of an upload."""
        self.down = False
        """Answer 403 to every commit."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        """Its address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id: str, files: dict[str, bytes], *, private: bool = True) -> Repo:
        """Make a repository that holds files."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b""})
        if files:
            repo.commit("main", {".gitattributes": b"", **files})
        return repo

    def close(self) -> None:
        """End."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    # ---------------------------------------------------------------- in and out

    def _route(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{method} {path}")
        if method == "PUT":
            return self._take_object(path.rsplit("/", 1)[-1])
        body = self._body()
        try:
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._resolve(*(unquote(part) for part in found.groups()))
            if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                return self._batch(found.group(1), json.loads(body))
            if path == "/api/whoami-v2":
                return self._whoami()
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if path == "/api/validate-yaml":
                return self._answer({"errors": [], "warnings": []})
            if found := API.fullmatch(path):
                repo_id, what, rest = found.groups()
                return self._model(method, repo_id, what, unquote(rest or "main"), body)
        except _Refused as refused:
            return self._answer({"error": refused.text}, refused.status, refused.headers)
        return self._answer({"error": f"no such page: {path}"}, 404)

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, held in (headers or {}).items():
            self.send_header(key, held)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _blocks(self) -> Any:
        """The body as it comes, of known length or in chunks."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0 and (block := self.rfile.read(min(left, BLOCK))):
            left -= len(block)
            yield block

    def _body(self) -> bytes:
        return b"".join(self._blocks())

    def _user(self) -> tuple[str, str] | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    # ---------------------------------------------------------------- who, and what may they

    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        token = {"displayName": "t", "role": user[1]}
        self._answer(
            {
                "type": "user",
                "name": user[0],
                "orgs": [
                    {"name": "club", "roleInOrg": "read"},
                    {"name": "lab", "roleInOrg": "admin"},
                ],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def _may_write(self, repo_id: str) -> None:
        user = self._user()
        if user is None:
            raise _Refused(401, "Unauthorized")
        if repo_id.split("/")[0] not in (user[0], "lab") or user[1] == "read":
            raise _Refused(403, "Forbidden: you must use a token with the right to write")

    def _repo(self, repo_id: str) -> Repo:
        repo, user = self.hub.repos.get(repo_id), self._user()
        hidden = repo is not None and repo.private and (user or ("",))[0] != repo_id.split("/")[0]
        if repo is None or (hidden and not repo_id.startswith("lab/")):
            raise _Refused(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        return repo

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked.get('organization') or (self._user() or ('?',))[0]}/{asked['name']}"
        if repo_id in self.hub.repos:
            return self._answer({"error": "You already created this model repo"}, 409)
        self._may_write(repo_id)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(repo_id, {}, private=private)
        self._answer({"url": f"{self.hub.url}/{repo_id}"})
        return None

    # ---------------------------------------------------------------- a repository

    def _model(self, method: str, repo_id: str, what: str | None, rest: str, body: bytes) -> None:
        repo = self._repo(repo_id)
        if method == "POST":
            self._may_write(repo_id)
        if what == "branch":
            start = repo.at(json.loads(body or b"{}").get("startingPoint", "main"))
            assert start is not None
            repo.branches[rest] = start[0]
            return self._answer({})
        found = repo.at(rest)
        if found is None:
            raise _Refused(404, "Invalid rev id", {"X-Error-Code": "RevisionNotFound"})
        oid, files = found
        match what:
            case None | "revision":
                siblings = [{"rfilename": path} for path in files]
                about = {"id": repo_id, "sha": oid, "private": repo.private, "tags": []}
                return self._answer(about | {"siblings": siblings, "downloads": 0, "likes": 0})
            case "tree":
                return self._answer([_entry(path, held) for path, held in files.items()])
            case "commits":
                listed = [
                    {"id": one, "title": "", "message": "", "authors": []}
                    for one in (commit[0] for commit in reversed(repo.commits))
                ]
                for one in listed:
                    one["date"] = "2026-01-01T00:00:00.000Z"
                return self._answer(listed)
            case "preupload":
                asked = json.loads(body)["files"]
                return self._answer({"files": [_mode(file["path"], files) for file in asked]})
            case "commit":
                return self._commit(repo_id, rest, files, body)
        raise _Refused(404, f"no such page: {what}")

    def _commit(self, repo_id: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
        if self.hub.down:
            raise _Refused(403, "the hub is closed")
        files = dict(files)
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            match change["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = self.hub.repos[repo_id].commit(branch, files)
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self._answer({"commitUrl": url, "commitOid": oid})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._repo(repo_id).at(revision)
        if found is None:
            raise _Refused(404, "Invalid rev id", {"X-Error-Code": "RevisionNotFound"})
        if path not in found[1]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]}
            raise _Refused(404, "Entry not found", headers)
        content = found[1][path]
        tag = hashlib.sha256(content).hexdigest()
        self._answer(content, 200, {"X-Repo-Commit": found[0], "ETag": f'"{tag}"'})

    # ---------------------------------------------------------------- large files

    def _batch(self, repo_id: str, asked: dict[str, Any]) -> None:
        self._repo(repo_id)
        self._may_write(repo_id)
        objects: list[dict[str, Any]] = []
        for wanted in asked["objects"]:
            told = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                told["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(told)
        self._answer({"transfer": "basic", "objects": objects})

    def _take_object(self, oid: str) -> None:
        content = b""
        index = len(self.hub.received)
        self.hub.received.append(0)
        for block in self._blocks():
            content += block
            time.sleep(self.hub.slow_seconds)
            self.hub.received[index] = len(content)
            if self.hub.drop_after is not None and len(content) >= self.hub.drop_after:
                self.close_connection = True
                self.connection.close()
                return
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer({"error": "the content is another"}, 400)
        self.hub.objects[oid] = content
        self._answer({})


class _Refused(Exception):
    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text = status, text
        self.headers = {"X-Error-Message": text, **(headers or {})}


def _entry(path: str, held: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(held), "oid": _git_oid(held)}
    if path.endswith(".safetensors"):
        oid = hashlib.sha256(held).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(held), "pointerSize": 130}
    return entry


def _mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    large = path.endswith(".safetensors")
    told = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if path in files:
        held = files[path]
        told["oid"] = hashlib.sha256(held).hexdigest() if large else _git_oid(held)
    return told


def _git_oid(held: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()
