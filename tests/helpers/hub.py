"""A small stand-in for the Hugging Face hub's HTTP API: repositories, commits of small files, Git LFS uploads, and downloads.

What it does not have: Xet (the hub's own storage, which the client prefers where it is installed: the tests turn it off),
the limits on rates and sizes, organizations and their rules, and the hub's real checks of a model card's metadata. Requests
and answers are those that huggingface-hub 2.4 was seen to send and understand, not a copy of the hub's documentation.
"""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """A hub on this machine.

    repositories: name → {"private": bool, "files": {name: bytes}}, and {"sha": commit} where it matters.
    break_after: uploads until the connection breaks.
    refuses: the status that a request is refused with; 0 where it is answered.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}  # by SHA-256
        self.uploaded: list[int] = []  # sizes
        self.break_after: int | None = None
        self.closed = False
        self.card_errors: list[str] = []  # what it has against a model card's metadata
        self.asked: list[str] = []
        self.refuses: Callable[[str], int] = lambda request: 0
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.closed = True
        self.shutdown()
        self.server_close()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of huggingface-hub, which reads its variables when it is imported: set where they are kept."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.reply({"error": "Invalid username or password."}, 401)
        return False

    def refused(self) -> bool:
        request = f"{self.command} {self.path}"
        self.server.asked.append(request)
        if self.server.closed:  # a connection that the client has kept
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if status := self.server.refuses(request):
            self.body()
            self.reply({"error": "not now"}, status)
        return bool(status)

    def do_HEAD(self) -> None:
        self.do_GET()

    def file(self) -> None:
        """/org/name/resolve/COMMIT/file, as HEAD or GET."""
        name, _, rest = self.path[1:].partition("/resolve/")
        commit, _, file = rest.partition("/")
        data = self.server.repositories[name]["files"][file]
        self.send_response(200)
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Content-Length": len(data),
        }
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_GET(self) -> None:
        kind, _, rest = self.path.partition("/api/models/")[2].partition("/tree/")
        repository = self.server.repositories.get(kind.partition("?")[0].partition("/revision/")[0])
        if self.refused() or not self.allowed():
            return
        if "/resolve/" in self.path:
            self.file()
            return
        if repository is None:
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif rest:
            self.reply(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in repository["files"].items()
                ]
            )
        else:
            siblings = [{"rfilename": name} for name in repository["files"]]
            sha = repository.get("sha", "0" * 40)
            self.reply(
                {"id": kind.partition("?")[0], "private": repository["private"], "siblings": siblings, "sha": sha}
            )

    def do_POST(self) -> None:
        if self.refused():
            return
        data = self.body()
        if not self.allowed():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            if asked["organization"] == "others":
                self.reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
                return
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {"private": asked["visibility"] == "private", "files": {}})
            self.reply({"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            errors = [{"message": error} for error in self.server.card_errors]
            self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif "/preupload/" in self.path:
            files = json.loads(data)["files"]
            modes = {True: "lfs", False: "regular"}
            self.reply({"files": [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False, "oid": None}
                for f in files
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            upload = lambda o: {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}  # noqa: E731
            self.reply({"transfer": "basic", "objects": [
                o | ({} if o["oid"] in self.server.stored else {"actions": upload(o)}) for o in objects
            ]})  # fmt: skip
        elif "/commit/" in self.path:
            self.commit(self.path.partition("/api/models/")[2].partition("/commit/")[0], data)
        else:
            self.reply({"error": "not known here"}, 404)

    def commit(self, repository: str, data: bytes) -> None:
        files = self.server.repositories[repository]["files"]
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.reply({"commitUrl": f"{self.server.address}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def do_PUT(self) -> None:
        data = self.body()
        if self.server.break_after is not None and len(self.server.uploaded) >= self.server.break_after:
            self.reply({"error": "the disk of the hub is on fire"}, 507)
            return
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        self.server.stored[self.path.rpartition("/")[2]] = data
        self.server.uploaded.append(len(data))
        self.reply({})
