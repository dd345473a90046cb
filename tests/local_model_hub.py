"""A small hub of models on loopback, for the real client: it tells, gives and takes the files of repositories."""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

TOKEN = "hf_test"


@dataclass
class ModelHub:
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)  # owner/name → path → bytes
    private: set[str] = field(default_factory=set)
    url: str = ""

    def commit_of(self, repo: str) -> str:
        files = self.repos[repo]
        return hashlib.sha1(b"".join(p.encode() + files[p] for p in sorted(files))).hexdigest()

    def publish(self, repo: str, folder: Path) -> None:
        self.repos[repo] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[ModelHub]:
    """The hub, with this process's client pointed at it."""
    hub = ModelHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(cache)), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield hub
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ModelHub

    def log_message(self, *_: object) -> None: ...

    @property
    def parts(self) -> list[str]:
        return [urllib.parse.unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]

    def answer(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match self.parts:
            case ["api", "models", owner, name, *rest] if f"{owner}/{name}" in self.hub.repos:
                self.tell(f"{owner}/{name}", rest)
            case [owner, name, "resolve", _, *path] if f"{owner}/{name}" in self.hub.repos:
                self.give(f"{owner}/{name}", "/".join(path))
            case _:
                self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def tell(self, repo: str, rest: list[str]) -> None:
        files = self.hub.repos[repo]
        if rest[:1] == ["tree"]:
            self.answer(
                200, [{"type": "file", "path": p, "size": len(files[p]), "oid": _etag(files[p])} for p in files]
            )
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": repo, "sha": self.hub.commit_of(repo), "siblings": siblings})

    def give(self, repo: str, path: str) -> None:
        data = self.hub.repos[repo].get(path)
        if data is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": self.hub.commit_of(repo)})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        match self.parts:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                self.hub.repos.setdefault(repo, {})
                self.hub.private |= {repo} if asked.get("private") or asked.get("visibility") == "private" else set()
                self.answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})
            case ["api", "models", _, _, "preupload", _]:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer(200, {"files": files})
            case ["api", "models", owner, name, "commit", _]:
                self.take(f"{owner}/{name}", [json.loads(line) for line in body.splitlines() if line])
            case ["api", "validate-yaml"]:  # of a card
                self.answer(200, {"errors": [], "warnings": []})
            case _:
                self.answer(404, {"error": self.path})

    def take(self, repo: str, lines: list[dict]) -> None:
        for line in lines:
            if line["key"] == "file":
                self.hub.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self.hub.commit_of(repo)
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
