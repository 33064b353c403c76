"""A hub of models and data sets on this machine, which speaks the protocol that ``huggingface_hub`` asks by.

It serves commits of folders under branches and tags: a repository's information, its tree, and its files, of which
weights are LFS files with their SHA-256. ``hub.use(monkeypatch, cache)`` points the client of this process at it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

LFS = (".safetensors", ".bin", ".model", ".parquet", ".gz")


class Hub:
    """The hub's content: of each repository its commits, by their hashes, and the names that stand for one."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.asked: list[str] = []
        self.broken: set[str] = set()  # files of which zeros arrive

    def commit(self, repo: str, folder: Path, *refs: str) -> str:
        """Add a folder's files as a commit, and let these branches and tags be it; return its hash."""
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
        return self.push(repo, files, *refs)

    def push(self, repo: str, files: dict[str, bytes], *refs: str) -> str:
        """Add these files as a commit, as ``commit``; of data sets and models one at most has a name."""
        sha = hashlib.sha1(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
        self.commits.setdefault(repo, {})[sha] = files
        self.refs.setdefault(repo, {}).update(dict.fromkeys(refs or ("main",), sha))
        return sha

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let this process ask this hub, with a cache of its own; nothing of it is there before."""
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        self.set_offline(monkeypatch, offline=False)

    @staticmethod
    def set_offline(monkeypatch: pytest.MonkeyPatch, *, offline: bool) -> None:
        """Set what ``HF_HUB_OFFLINE`` says, which the client reads once."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers and body of an answer."""
        match unquote(path).strip("/").split("/"):
            case ["api", "models" | "datasets", owner, name, *rest]:
                repo = f"{owner}/{name}"
                revision = "/".join(rest[1:]) if rest else "main"
            case ["datasets", owner, name, "resolve", revision, *file] | [owner, name, "resolve", revision, *file]:
                repo, rest = f"{owner}/{name}", ["resolve", "/".join(file)]
            case _:
                return 404, {}, b""
        if repo not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        sha = self.refs[repo].get(revision, revision)
        files = self.commits[repo].get(sha)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if rest[:1] == ["resolve"]:
            if rest[1] not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            content = files[rest[1]]
            sent = bytes(len(content)) if rest[1] in self.broken else content
            return 200, {"ETag": f'"{_etag(rest[1], content)}"', "X-Repo-Commit": sha}, sent
        tree = [_entry(name, content) for name, content in files.items()]
        siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"], "lfs": e.get("lfs")} for e in tree]
        about: Any = tree if rest[:1] == ["tree"] else {
            "id": repo, "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": siblings,
        }  # fmt: skip
        return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()


def _etag(name: str, content: bytes) -> str:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest() if name.endswith(LFS) else blob


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name.endswith(LFS):
        entry["lfs"] = {
            "oid": _etag(name, content), "sha256": _etag(name, content), "size": len(content), "pointerSize": 130,
        }  # fmt: skip
    return entry


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(with_body=True)

        def do_HEAD(self) -> None:
            self._send(with_body=False)

        def _send(self, *, with_body: bool) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(path)
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
