"""A Hub on the loopback: whoami, create, branch, preupload, LFS, commit, info and resolve, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_test_token"
TIMEOUT = 0.5
"""Seconds that the client waits in the tests of late answers."""


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})

    def commit_id(self, branch: str) -> str:
        """A hash of the branch's history, as git's are."""
        text = repr([(sorted(c), [hashlib.sha256(c[k]).hexdigest() for k in sorted(c)]) for c in self.branches[branch]])
        return hashlib.sha1(f"{branch}{text}".encode()).hexdigest()


@dataclass
class Hub:
    """What the server knows, and the fault to inject: what to do instead of answering which request, from 0."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[int, int | str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def faulty(self, number: int) -> bool:
        """Play a request's fault: a status, "cut" for half an answer, "drop" for none, "hang" for a very late one."""
        fault = self.hub.faults.pop(number, None)
        if fault is None:
            return False
        self.read()
        self.close_connection = not isinstance(fault, int)
        if isinstance(fault, int):
            self.answer(fault, {"error": "injected"})
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"half")
        elif fault == "hang":
            threading.Event().wait(3 * TIMEOUT)
        return True

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline(), 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def allowed(self, name: str) -> Repository | None:
        """The repository, unless it is missing, or private and no token was given: as the Hub, 404 for both."""
        repository = self.hub.repositories.get(name)
        hidden = repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}")
        if hidden:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repository

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if self.faulty(len(self.hub.requests) - 1):
            return
        parts = path.split("/")
        if path == "api/repos/create":
            self.create()
        elif path == "api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.answer(200 if known else 401, {"name": "me"} if known else {"error": "Invalid username or password."})
        elif path == "api/validate-yaml":
            front = json.loads(self.read())["content"].split("---")[1]
            bad = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no metadata"}]
            self.answer(400 if bad else 200, {"errors": bad, "warnings": []})
        elif path.startswith("upload/"):
            self.hub.objects[parts[1]] = self.read()
            self.answer(200)
        elif "resolve" in parts:
            self.resolve(parts)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(path.removesuffix(".git/info/lfs/objects/batch"))
        elif parts[:2] == ["api", "models"]:
            self.model(parts[2:])
        else:
            self.read()
            self.answer(404, {"error": path})

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815

    def create(self) -> None:
        wanted = json.loads(self.read())
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private)
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def model(self, parts: list[str]) -> None:
        name, rest, body = "/".join(parts[:2]), parts[2:], self.read()
        repository = self.allowed(name)
        if repository is None:
            return None
        action, branch = (rest[0], rest[1] if len(rest) > 1 else "main") if rest else ("revision", "main")
        if action == "branch":
            if branch in repository.branches:
                return self.answer(409, {"error": "Reference already exists"})
            repository.branches[branch] = [*repository.branches["main"]]
            return self.answer(200, {})
        if branch not in repository.branches:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        if action == "preupload":
            files = [
                {
                    "path": f["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if action == "commit":
            return self.commit(name, repository, branch, body)
        files = repository.branches[branch][-1]
        return self.answer(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": repository.commit_id(branch),
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": f} for f in files],
            },
        )

    def commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.branches[branch][-1])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.objects.get(entry["value"]["oid"])
                if content is None or hashlib.sha256(content).hexdigest() != entry["value"]["oid"]:
                    return self.answer(400, {"error": "LFS pointer pointed to a file that does not exist"})
                files[entry["value"]["path"]] = content
        repository.branches[branch].append(files)
        oid = repository.commit_id(branch)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def batch(self, name: str) -> None:
        wanted = json.loads(self.read())
        if self.allowed(name) is None:
            return
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}", "header": {}}}}
            if o["oid"] not in self.hub.objects
            else o
            for o in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def resolve(self, parts: list[str]) -> None:
        at = parts.index("resolve")
        repository = self.allowed("/".join(parts[:at]))
        if repository is None:
            return
        revision, file = parts[at + 1], "/".join(parts[at + 2 :])
        branch = next((b for b in repository.branches if revision in (b, repository.commit_id(b))), None)
        if branch is None:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        content = repository.branches[branch][-1].get(file)
        if content is None:
            return self.answer(
                404,
                {"error": "Entry not found"},
                X_Error_Code="EntryNotFound",
                X_Repo_Commit=repository.commit_id(branch),
            )
        return self.answer(
            200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=repository.commit_id(branch)
        )


def serve() -> tuple[Hub, ThreadingHTTPServer]:
    """Start a Hub on a free port of the loopback; call `shutdown()` of the second at the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub, server
