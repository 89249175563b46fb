"""A small Hugging Face Hub on localhost, for the real huggingface_hub client: HF_ENDPOINT names it.

It answers as the hub does where a client looks: revisions and files of models, ETag, X-Repo-Commit, X-Linked-*, a
redirect to where large files are, Range, and the codes and headers of its refusals. What it was asked is in
``requests``; ``fault`` says what shall go wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = ".safetensors"  # what the hub keeps elsewhere


@dataclass
class Repository:
    """``revisions`` has branches, tags and commits; each commit has its files."""

    hub_id: str
    kind: str = "models"
    gated: bool = False
    private: bool = False
    revisions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes | Path], branch: str = "main") -> str:
        """Let ``branch`` be a commit with these files, and return it."""
        held = {name: value.read_bytes() if isinstance(value, Path) else value for name, value in files.items()}
        made = hashlib.sha1(f"{self.hub_id} {len(self.files)}".encode()).hexdigest()
        self.files[made] = held
        self.revisions |= {branch: made, made: made}
        return made


@dataclass
class Fault:
    """What goes wrong, and how often (for ever: None).

    Attributes:
        where: a regular expression for paths; others are answered.
        status: to answer with.
        cut_after: bytes of the body after which the connection is cut.
        delay: seconds before each answer.
    """

    where: str = ""
    status: int | None = None
    cut_after: int | None = None
    delay: float = 0.0
    times: int | None = None


class HubServer:
    """The server. ``accounts`` has, by token, the gated and private models that its owner may read."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.accounts: dict[str, set[str]] = {}
        self.requests: list[str] = []
        self.fault: Fault | None = None
        self.lock = threading.Lock()
        self._server = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage(self) -> str:
        """Where large files are: the hub's is another host, to which clients send no token."""
        return f"http://localhost:{self._server.server_port}"

    def add(
        self, hub_id: str, files: Mapping[str, bytes | Path] | Path, *, kind: str = "models", **settings: bool
    ) -> Repository:
        """A repository whose ``main`` has these files, or those of a folder."""
        repository = Repository(hub_id, kind, **settings)
        if isinstance(files, Path):
            files = {path.name: path for path in files.iterdir()}
        repository.commit(files)
        self.repositories[f"{kind}/{hub_id}"] = repository
        return repository

    def downloads(self) -> list[str]:
        """The names of the files whose content was asked for."""
        return [line.rpartition("/")[2] for line in self.requests if re.match("GET /[^/]+/[^/]+/resolve/", line)]

    def close(self) -> None:
        """No longer answer: connections are cut, and refused from now on. Harmless when repeated."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in self._server.connections:
            with suppress(OSError):  # its client has closed it
                connection.shutdown(socket.SHUT_RDWR)


def use_hub(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a user with HF_HOME ``home``, who is not logged in, and whose hub is ``hub``."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(home))


@contextmanager
def serving_hub() -> Iterator[HubServer]:
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()


class _Listener(ThreadingHTTPServer):
    """Knows its connections, which clients keep open for more requests."""

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        super().__init__(address, handler)
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that has gone away is not an error
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in the server's list."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self._fault_of(path)
        if not path.startswith("/api/agent-harnesses"):  # of the client itself, once a day
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {path}")
        if fault is not None:
            time.sleep(fault.delay)
            if fault.status is not None:
                self._refuse(fault.status, "", "the hub is not well")
                return
        if stored := re.fullmatch("/stored/([0-9a-f]{64})", path):
            self._send_stored(stored[1], fault)
        elif api := re.fullmatch("/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._answer_api(*api.groups())
        elif file := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._answer_file(*file.groups(), fault=fault)
        else:
            self._refuse(404, "", "no such page")

    def _fault_of(self, path: str) -> Fault | None:
        with self.hub.lock:
            fault = self.hub.fault
            if fault is None or not re.search(fault.where, path):
                return None
            if fault.times is not None:
                fault.times -= 1
                if not fault.times:
                    self.hub.fault = None
            return fault

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def _repository(self, kind: str, hub_id: str) -> Repository | None:
        """The repository; None where it was refused, since it is unknown, or private and not this account's."""
        token = self._token()
        if token is not None and token not in self.hub.accounts:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        found = self.hub.repositories.get(f"{kind}/{hub_id}")
        if found is None or (found.private and hub_id not in self.hub.accounts.get(token or "", ())):
            if token is None:  # the hub does not tell strangers what there is
                self._refuse(401, "RepoNotFound", "Invalid username or password.")
            else:
                self._refuse(404, "RepoNotFound", "Repository not found")
            return None
        return found

    def _answer_api(self, kind: str, hub_id: str, what: str | None, revision: str | None) -> None:
        repository = self._repository(kind, hub_id)
        if repository is None:
            return
        commit = repository.revisions.get(revision or "main")
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repository.files[commit]
        answer: object = {
            "id": hub_id,
            "sha": commit,
            "gated": "manual" if repository.gated else False,
            "private": repository.private,
            "siblings": [{"rfilename": name, "size": len(content)} for name, content in files.items()],
            "tags": [],
        }
        if what == "tree":
            answer = [_entry(name, content) for name, content in files.items()]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, hub_id: str, revision: str, name: str, *, fault: Fault | None) -> None:
        repository = self._repository("models", hub_id)
        if repository is None:
            return
        token = self._token()
        if repository.gated and hub_id not in self.hub.accounts.get(token or "", ()):
            restricted = f"Access to model {hub_id} is restricted"
            if token is None:
                self._refuse(401, "GatedRepo", f"{restricted}. You must be authenticated to access it.")
            else:
                self._refuse(403, "GatedRepo", f"{restricted} and you are not in the authorized list.")
            return
        commit = repository.revisions.get(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        content = repository.files[commit].get(name)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
        if not name.endswith(LARGE):
            self._send(200, content, headers, fault)
            return
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", headers | {"Location": f"{self.hub.storage}/stored/{digest}"})

    def _send_stored(self, digest: str, fault: Fault | None) -> None:
        commits = [files for one in self.hub.repositories.values() for files in one.files.values()]
        content = next(held for files in commits for held in files.values() if _sha256(held) == digest)
        self._send(200, content, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, fault)

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **told})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault | None = None) -> None:
        size = len(body)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if status == 200 and wanted:
            start = int(wanted[1])
            status, body = 206, body[start:]
            headers = {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut_after is not None and len(body) > fault.cut_after:
            self.wfile.write(body[: fault.cut_after])
            self.close_connection = True
            return
        self.wfile.write(body)


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": _blob_id(content), "size": len(content), "path": name}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
