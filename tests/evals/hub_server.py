"""As much of the Hub's HTTP interface as pushing a model needs, on this machine.

Speaks: whoami, repository creation and lookup, card validation, preupload, LFS batch, upload and verification, commit.
Keeps what it was sent: ``server.files[repo_id][path]`` are the bytes of each file, large ones included. What it has, it
says it has: hashes in the answer to preupload, no upload address for objects that lie there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TASKS = {"text-generation", "text-classification"}
"""Of those the Hub knows, the ones that are used here."""


def _errors_of_a_card(text: str) -> list[dict[str, str]]:
    """What the Hub says of metadata that it can't use, for the fields that cards of ours have."""
    parts = text.split("---\n", 2)
    if not text.startswith("---\n") or len(parts) < 3:
        return [{"message": "no metadata"}]
    front = yaml.safe_load(parts[1])
    wrong = [
        *(key for key in ("license", "library_name", "model_name") if not isinstance(front.get(key, ""), str)),
        *(key for key in ("tags", "language", "datasets") if not _texts(front.get(key, []))),
        *(["pipeline_tag"] if front.get("pipeline_tag", "text-generation") not in TASKS else []),
        *(["base_model"] if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", front.get("base_model", "a/b")) else []),
        *(
            ["base_model_relation"]
            if front.get("base_model_relation", "adapter") not in ("adapter", "finetune")
            else []
        ),
    ]
    for model in front.get("model-index", []):
        for result in model["results"]:
            good = result["task"]["type"] in TASKS and {"type", "name"} <= result["dataset"].keys()
            metrics = all({"type", "value"} <= metric.keys() for metric in result["metrics"])
            wrong += [] if good and metrics and model["name"] else ["model-index"]
    return [{"message": f'"{key}" is not valid'} for key in wrong]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _oid(content: bytes | None, *, large: bool) -> str | None:
    """By which git and LFS know a file."""
    if content is None:
        return None
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


LARGE = (".safetensors", "tokenizer.json")
"""What the Hub would ask to have sent as LFS objects."""


class HubServer:
    """A context manager; ``endpoint`` is its address."""

    def __init__(self, *, owner: str = "alice", token: str = "hf_" + "a1" * 17) -> None:
        self.owner, self.token = owner, token
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.verified: set[str] = set()
        self.fail_commits = False
        self.uploads_until_it_dies: int | None = None
        """After so many large files the connection is cut in the middle of the next one, every time."""
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        hub = self.server_state
        self._note()
        if not self._allowed():
            return
        if self.path.startswith("/api/whoami-v2"):
            self._answer({"type": "user", "name": hub.owner, "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        elif found := re.match(r"/api/models/([^/]+/[^/?]+)", self.path):
            repo = found[1]
            if repo not in hub.private:
                self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            else:
                self._answer({"id": repo, "private": hub.private[repo], "sha": "0" * 40, "tags": [], "siblings": []})
        else:
            self._answer({"error": f"no GET {self.path} here"}, 404)

    def do_POST(self) -> None:
        hub = self.server_state
        self._note()
        body = self._body()
        if not self._allowed():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or hub.owner}/{asked['name']}"
            address = {"url": f"{hub.endpoint}/{repo}", "name": repo, "id": repo}
            if repo in hub.private:
                self._answer({"error": "You already created this model repo", **address}, 409)
                return
            hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.files[repo] = {}
            self._answer(address)
        elif self.path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            errors = _errors_of_a_card(text)
            self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(hub.files[found[1]].get(file["path"]), large=file["path"].endswith(LARGE)),
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                each
                if each["oid"] in hub.large
                else {
                    **each,
                    "actions": {
                        "upload": {"href": f"{hub.endpoint}/large/{each['oid']}"},
                        "verify": {"href": f"{hub.endpoint}/verify"},
                    },
                }
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif self.path == "/verify":
            asked = json.loads(body)
            held = hub.large.get(asked["oid"])
            right = held is not None and len(held) == asked["size"]
            hub.verified |= {asked["oid"]} if right else set()
            self._answer({} if right else {"error": "not what was announced"}, 200 if right else 422)
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            if hub.fail_commits:
                self._answer({"error": "storage quota exceeded"}, 403)
                return
            self._commit(found[1], body)
            self._answer({"commitUrl": f"{hub.endpoint}/{found[1]}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer({"error": f"no POST {self.path} here"}, 404)

    def do_PUT(self) -> None:
        self._note()
        left = self.server_state.uploads_until_it_dies
        if left is not None:
            if left <= 0:
                self.rfile.read(1)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.server_state.uploads_until_it_dies = left - 1
        body = self._body()
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server_state.large[oid] = body
        self._answer({})

    def _commit(self, repo: str, body: bytes) -> None:
        hub = self.server_state
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                hub.commits.append(value["summary"])
            elif entry["key"] == "file":
                hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                assert value["oid"] in hub.verified
                hub.files[repo][value["path"]] = hub.large[value["oid"]]

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.server_state.token}":
            return True
        if self.path == "/api/validate-yaml":  # for anybody, as on the Hub
            return True
        self._answer({"error": "Invalid username or password."}, 401)
        return False

    def _note(self) -> None:
        self.server_state.requests.append(f"{self.command} {self.path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(
        self, body: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
