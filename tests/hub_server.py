"""A server on loopback that answers as the Hugging Face Hub does, as a plain host, and as S3.

It keeps what it was asked, and fails as it is told to: `faults` are taken one for each range that
is asked for, `always` is for all of them.

    drop     the connection breaks in the middle of the body
    short    the body ends early, the length was promised in full
    cut      the body ends early, and the promised length with it
    503, 429, 403 ...   that status
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SHA = "1234567890abcdef1234567890abcdef12345678"
CONVERTED_SHA = "cccccccccccccccccccccccccccccccccccccccc"


class Asked(NamedTuple):
    """A request: its path, its range and who asks."""

    path: str
    range: str | None
    authorization: str | None


@dataclass
class Hub:
    """`datasets` are files by name for (dataset, commit); `web` are files of a plain host."""

    url: str = ""
    datasets: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": SHA})
    web: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    faults: deque[str] = field(default_factory=deque)
    always: str | None = None
    asked: list[Asked] = field(default_factory=list)
    ranges: bool = True
    page: int = 1000

    def ranged(self) -> list[Asked]:
        """The requests for content."""
        return [each for each in self.asked if each.range]

    def add(self, repository: str, files: dict[str, bytes], sha: str = SHA) -> None:
        """A dataset, or another commit of one."""
        self.datasets[repository, sha] = files
        if sha == CONVERTED_SHA:
            self.revisions["refs/convert/parquet"] = sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        """As S3 is asked about an object; of the others nobody asks."""
        content = self.hub.web.get(self.path.rpartition("/")[2])
        if content is None:
            return self._status(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content):x}"')
        self.end_headers()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.hub.asked.append(
            Asked(self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            self._api("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        elif parts[0] == "datasets":  # large files are elsewhere, as the Hub's are
            self._status(302, Location=f"{self.hub.url}/cdn/{'/'.join(parts[1:])}")
        elif parts[0] == "cdn":
            content = self.hub.datasets["/".join(parts[1:3]), parts[4]]["/".join(parts[5:])]
            self._content(content, etag=None)
        elif parts[-1] in self.hub.web:
            content = self.hub.web[parts[-1]]
            self._content(content, etag=f"{hash(content):x}")
        else:
            self._status(404)

    # ------------------------------------------------------------ the Hub's own answers

    def _api(self, repository: str, rest: list[str], query: dict[str, list[str]]) -> None:
        known = {name for name, _ in self.hub.datasets}
        if self.hub.faults and self.hub.faults[0] == "api 503":
            self.hub.faults.popleft()
            return self._status(503)
        if repository in self.hub.gated:
            return self._status(403, **{"X-Error-Code": "GatedRepo"})
        if repository not in known:
            return self._status(401, **{"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        sha = self.hub.revisions.get(revision, revision)
        if (repository, sha) not in self.hub.datasets:
            return self._status(404, **{"X-Error-Code": "RevisionNotFound"})
        if rest and rest[0] == "tree":
            return self._tree(repository, sha, "/".join(rest[2:]), query)
        card = self.hub.cards.get(repository)
        self._json({"id": repository, "sha": sha} | ({"cardData": card} if card else {}))

    def _tree(self, repository: str, sha: str, folder: str, query: dict[str, list[str]]) -> None:
        files = self.hub.datasets[repository, sha]
        under = [name for name in files if not folder or name.startswith(f"{folder}/")]
        if not under:
            return self._status(404, **{"X-Error-Code": "EntryNotFound"})
        entries = [{"type": "directory", "path": "some", "oid": "0", "size": 0}]
        for name in under:
            digest = hashlib.sha256(files[name]).hexdigest()
            lfs = {"oid": digest, "size": len(files[name]), "pointerSize": 130}
            entry = {"type": "file", "path": name, "size": len(files[name]), "oid": digest[:40]}
            entries.append(entry | ({"lfs": lfs} if len(files[name]) > 1000 else {}))
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.hub.page
        path = self.path.partition("?")[0]
        more = f'<{self.hub.url}{path}?recursive=True&cursor={end}>; rel="next"'
        self._json(entries[start:end], **({"Link": more} if end < len(entries) else {}))

    # ------------------------------------------------------------ content

    def _content(self, content: bytes, *, etag: str | None) -> None:
        fault = self.hub.always
        if fault is None and self.hub.faults:
            fault = self.hub.faults.popleft()
        if fault is not None and fault.isdecimal():
            return self._status(int(fault), **{"Retry-After": "0"})
        told = {"ETag": f'"{etag}"'} if etag else {}
        if etag and self.headers.get("If-Match", told["ETag"]) != told["ETag"]:
            return self._status(412)
        status, asked = 200, self.headers.get("Range")
        if asked and self.hub.ranges:
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            told["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            status, content = 206, content[first : last + 1]
        self._body(status, content, fault, told)

    def _body(self, status: int, content: bytes, fault: str | None, told: dict[str, str]) -> None:
        whole = len(content)
        content = content[: whole // 2] if fault else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if fault == "cut" else whole))
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = bool(fault)
        if fault == "drop":
            self.wfile.flush()
            linger = struct.pack("ii", 1, 0)  # closing now is a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def _json(self, document: object, **headers: str) -> None:
        self._status(200, json.dumps(document).encode(), **headers)

    def _status(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """A connection that broke: as it was told to, or closed by who had enough."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, on a port of its own while this lasts."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub talks to, and pauses that do not last."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import close_session, constants

    from tuppence.text import remote

    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with serving(Hub()) as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)  # read when the library is imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running
        close_session()
