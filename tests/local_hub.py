"""A small hub on loopback: the routes of the real one that a dataset's files come by, and its bad days."""

import hashlib
import json
import threading
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class LocalHub:
    """Datasets at commits, and the faults that the next answers show."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # repo → commit → path → bytes
    heads: dict[str, str] = field(default_factory=dict)  # repo → commit of main
    files: dict[str, bytes] = field(default_factory=dict)  # path → bytes, of a server that is no hub
    cut_after: int = 0  # bytes of a file that a connection brings before it breaks; 0: all
    cut_answers: int = 0  # of the interface to come that break off in their midst
    silent_answers: int = 0  # of the interface to come that stop in their midst and keep the connection
    busy: int = 0  # answers of 429 to come
    retry_after: str = "0"
    wrong_bytes: int = 0  # files to come with their first byte changed
    ignore_range: bool = False
    page: int = 1000  # entries of a tree in one answer
    token: str = ""  # that a request must carry, if any
    held: dict[str, threading.Event] = field(default_factory=dict)  # path → when its start may be sent
    asked: dict[str, threading.Event] = field(default_factory=dict)  # path → set once it is asked for
    content_at: str = ""  # another server that files are redirected to, as the real hub does with its CDN
    tokens_seen: list[str] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def publish(self, repo: str, commit: str, files: dict[str, bytes]) -> None:
        self.repos.setdefault(repo, {})[commit] = files
        self.heads[repo] = commit

    def __enter__(self) -> "LocalHub":
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments: object):
                self.hub = hub
                super().__init__(*arguments)  # type: ignore[arg-type]

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_: object) -> None:
        """Tests read `requests` instead."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.hub.requests.append(("GET", path, self.headers.get("Range", "")))
        self.hub.tokens_seen.append(self.headers.get("Authorization", ""))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, b"")
        elif self.hub.busy:
            self.hub.busy -= 1
            self.answer(429, b"", {"Retry-After": self.hub.retry_after})
        elif path.startswith("/api/datasets/"):
            self.tell(path.removeprefix("/api/datasets/").split("/"), urllib.parse.parse_qs(query))
        elif path.startswith("/datasets/") and self.hub.content_at:
            self.answer(302, b"", {"Location": self.hub.content_at + path})
        elif path.startswith("/datasets/"):
            self.send(path.removeprefix("/datasets/").split("/"))
        else:
            self.send_bytes(self.hub.files.get(path.lstrip("/")))

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if status == 200 and self.hub.cut_answers:
            self.hub.cut_answers -= 1
            self.close_connection = True
            body = body[: len(body) // 2]
        if status == 200 and self.hub.silent_answers:
            self.hub.silent_answers -= 1
            self.wfile.write(body[:1])
            return
        self.wfile.write(body)

    def tell(self, parts: list[str], query: dict[str, list[str]]) -> None:
        """/owner/name/revision/R gives a commit, /owner/name/tree/COMMIT/FOLDER a page of its files."""
        repo, (what, revision) = "/".join(parts[:2]), parts[2:4]
        commits = self.hub.repos.get(repo, {})
        commit = self.hub.heads.get(repo) if revision == "main" else revision
        if commit not in commits:
            self.answer(404, b"")
        elif what == "revision":
            self.answer(200, json.dumps({"id": repo, "sha": commit}).encode())
        else:
            folder = urllib.parse.unquote("/".join(parts[4:]))
            self.tell_tree(commits[commit], folder, int(query.get("cursor", ["0"])[0]))

    def tell_tree(self, files: dict[str, bytes], folder: str, first: int) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [p for p in files if p.startswith(prefix)]
        listed: list[dict[str, object]] = [
            {"type": "directory", "path": d, "size": 0}
            for d in sorted({prefix + p.removeprefix(prefix).split("/")[0] for p in inside} - set(inside))
        ]
        for path in sorted(p for p in inside if "/" not in p.removeprefix(prefix)):
            data = files[path]
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            listed.append({"type": "file", "path": path, "size": len(data), "lfs": lfs})
        if folder and not listed:
            self.answer(404, b"")
            return
        rest = first + self.hub.page
        path = self.path.partition("?")[0]
        link = {"Link": f'<{self.hub.url}{path}?cursor={rest}>; rel="next"'} if rest < len(listed) else {}
        self.answer(200, json.dumps(listed[first:rest]).encode(), link)

    def send(self, parts: list[str]) -> None:
        """/owner/name/resolve/COMMIT/PATH gives a file's bytes, or the range of them that is asked for."""
        repo, commit = "/".join(parts[:2]), parts[3]
        path = urllib.parse.unquote("/".join(parts[4:]))
        if path in self.hub.asked:
            self.hub.asked[path].set()
        if path in self.hub.held and not self.headers.get("Range"):
            self.hub.held[path].wait(500)
        data = self.hub.repos.get(repo, {}).get(commit, {}).get(path)
        self.send_bytes(data)

    def send_bytes(self, data: bytes | None) -> None:
        if data is None:
            self.answer(404, b"")
            return
        asked = self.headers.get("Range", "")
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not self.hub.ignore_range else 0
        if first >= len(data) > 0:
            self.answer(416, b"")
            return
        body = data[first:]
        if self.hub.wrong_bytes and first == 0:
            self.hub.wrong_bytes -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(206 if asked and not self.hub.ignore_range else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body[: self.hub.cut_after] if self.hub.cut_after else body
        with suppress(ConnectionError):  # the client may be killed meanwhile
            self.wfile.write(sent)
        if len(sent) < len(body):
            self.close_connection = True
