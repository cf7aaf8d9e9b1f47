"""A Hugging Face Hub on 127.0.0.1 for the real clients: downloads, errors as the Hub words them, faults, uploads.

    with HubServer() as hub:
        hub.add("models/openai-community/gpt2", {"config.json": b"{}"}, alias="gpt2")
        hub.faults.append(Fault("GET .*safetensors", after_bytes=1000, once=True))  # the connection breaks there once
        subprocess.run(command, env=hub.environment(tmp_path))

`hub.requests` has all that was asked. No pages, no Xet, no CDN."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, STRANGER = "hf_member", "hf_stranger"  # the first may read and write all, the second is a user who may not
Files = dict[str, bytes]


@dataclasses.dataclass
class Repository:
    """Files by branch or tag; a commit is what its files hash to."""

    name: str
    branches: dict[str, Files]
    alias: str = ""
    gated: bool = False
    private: bool = False

    def revision(self, word: str) -> tuple[str, Files]:
        """(commit, files) of a branch, tag or commit."""
        for branch, files in self.branches.items():
            if word in (branch, _commit(files)):
                return _commit(files), files
        raise _error(404, f"Invalid rev id: {word}", "RevisionNotFound")


def _commit(files: Files) -> str:
    return hashlib.sha1(b"".join(name.encode() + _oid(data) for name, data in sorted(files.items()))).hexdigest()


def _oid(data: bytes) -> bytes:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest().encode()


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests whose `METHOD PATH` `match` finds, with all or the first of them."""

    match: str
    once: bool = False
    status: int | None = None  # answered instead
    delay: float = 0.0  # seconds before the answer
    after_bytes: int | None = None  # of the body, then the connection is reset


class HubServer:
    """The server and what a test says to it; `url` is what HF_ENDPOINT is to be."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}  # by models/OWNER/NAME or datasets/OWNER/NAME
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []
        self.uploads: Files = {}  # large files by SHA-256, before their commit
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Files, *, branch: str = "main", **about: Any) -> str:
        """Make a repository, or another branch of it; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(name.partition("/")[2], {}))
        repository.branches[branch] = dict(files)
        for key, value in about.items():
            setattr(repository, key, value)
        return _commit(files)

    def environment(self, home: Path, **others: str) -> dict[str, str]:
        """Environment variables with which the Hub's clients ask this server and have a cache of their own."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        here = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return kept | here | others

    def fault_of(self, request: str) -> Fault | None:
        with self.lock:
            fault = next((fault for fault in self.faults if re.search(fault.match, request)), None)
            if fault is not None and fault.once:
                self.faults.remove(fault)
        return fault


class _Answer(Exception):  # raised, so that it may come from anywhere
    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _json(value: Any, status: int = 200, **headers: str) -> _Answer:
    return _Answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)


def _error(status: int, message: str, code: str = "", **headers: str) -> _Answer:
    return _json({"error": message}, status, X_Error_Message=message, X_Error_Code=code, **headers)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        self.parts = [unquote(part) for part in split.path.strip("/").split("/")]
        self.query = parse_qs(split.query)
        self.body = self._read()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        fault = self.hub.fault_of(f"{self.command} {self.path}")
        try:
            if fault is not None:
                time.sleep(fault.delay)
                if fault.status is not None:
                    raise _error(fault.status, "The server was told to fail")
            self._route()
        except _Answer as answer:
            asked = {"method": self.command, "path": split.path, "range": self.headers.get("Range")}
            self.hub.requests.append({**asked, "status": answer.status, "body": "ETag" in answer.headers})
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._send(answer, fault)

    do_HEAD = do_POST = do_PUT = do_GET

    def _read(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: _Answer, fault: Fault | None) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = answer.body[: None if fault is None else fault.after_bytes]
        self.wfile.write(sent)
        if len(sent) < len(answer.body):  # a broken line, not a polite end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def _route(self) -> None:
        if self.token not in ("", TOKEN, STRANGER):
            raise _error(401, "Invalid credentials in Authorization header")
        match self.parts:
            case ["api", "validate-yaml"]:
                raise _json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create()
            case ["api", ("models" | "datasets") as kind, *rest]:
                self._api(kind, rest)
            case ["uploads", sha256]:
                self.hub.uploads[sha256] = self.body
                raise _Answer(200)
            case [*repository, "info", "lfs", "objects", "batch"]:
                self._lfs_batch(repository)
            case ["datasets", *rest] if "resolve" in rest:
                self._file("datasets", rest)
            case [*rest] if "resolve" in rest:
                self._file("models", rest)
        raise _error(404, "Sorry, we can't find the page you are looking for.")

    def _repository(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get(f"{kind}/{name}")
        for other in self.hub.repositories.values():
            if other.alias == name:
                raise _Answer(307, Location=self.path.replace(f"/{name}/", f"/{other.name}/", 1))
        if repository is None or (repository.private and self.token != TOKEN):
            status = 404 if self.token else 401
            raise _error(status, "Repository not found" if self.token else "Invalid username", "RepoNotFound")
        return repository

    def _file(self, kind: str, parts: list[str]) -> None:
        at = parts.index("resolve")
        repository, path = self._repository(kind, "/".join(parts[:at])), "/".join(parts[at + 2 :])
        if repository.gated and self.token != TOKEN and path not in ("README.md", ".gitattributes"):
            raise _error(403 if self.token else 401, f"Access to {repository.name} is restricted.", "GatedRepo")
        commit, files = repository.revision(parts[at + 1])
        if path not in files:
            raise _error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit)
        data, status, about = files[path], 200, {"X_Repo_Commit": commit, "ETag": f'"{_oid(files[path]).decode()}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            about["Content_Range"] = f"bytes {asked[1]}-{len(data) - 1}/{len(data)}"
            data, status = data[int(asked[1]) :], 206
        raise _Answer(status, data, Accept_Ranges="bytes", **about)

    def _api(self, kind: str, rest: list[str]) -> None:
        verbs = ("revision", "tree", "preupload", "commit")
        at = next((i for i, part in enumerate(rest) if part in verbs and i), len(rest))
        repository = self._repository(kind, "/".join(rest[:at]))
        verb, word = rest[at] if at < len(rest) else "revision", rest[at + 1] if at < len(rest) else "main"
        if verb in ("preupload", "commit"):
            self._upload(repository, verb, word)
        commit, files = repository.revision(word)
        if verb == "tree":
            raise _json(
                [{"type": "file", "path": p, "size": len(d), "oid": _oid(d).decode()} for p, d in files.items()]
            )
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        raise _json({"id": repository.name, "sha": commit, "siblings": siblings, "private": repository.private})

    def _create(self) -> None:
        self._must_be_member()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'member'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if f"models/{name}" in self.hub.repositories:
            raise _json({"error": "You already created this repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(f"models/{name}", {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        raise _json({"url": url, "name": name, "id": "0" * 24})

    def _must_be_member(self) -> None:
        if self.token != TOKEN:
            raise _error(403 if self.token else 401, "You don't have the rights to write here")

    def _lfs_batch(self, parts: list[str]) -> None:
        self._must_be_member()
        objects = json.loads(self.body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.hub.url}/uploads/{each['oid']}", "header": {}}}
        raise _json({"transfer": "basic", "objects": objects})

    def _upload(self, repository: Repository, verb: str, branch: str) -> None:
        self._must_be_member()
        files = repository.branches[branch]
        if verb == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for f in json.loads(self.body)["files"]
            ]  # fmt: skip
            raise _json({"files": modes, "commitOid": _commit(files)})
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        url = f"{self.hub.url}/{repository.name}/commit/{_commit(files)}"
        raise _json({"success": True, "commitOid": _commit(files), "commitUrl": url})
