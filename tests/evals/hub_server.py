"""As much of the Hub's HTTP interface as pushing and fetching a model needs, on this machine.

Speaks: whoami, repository creation and lookup, card validation, preupload, LFS batch, upload and verification, commit,
listing and download. Keeps what it was sent: ``server.files[repo_id][path]`` are the bytes of each file, large ones
included. What it has, it says it has: hashes in the answer to preupload, no upload address for objects that lie there.
What is public can be read without a token.
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


def commit_of(files: dict[str, bytes]) -> str:
    """Forty digits that change with the files."""
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha1(content).digest())
    return digest.hexdigest()


LARGE = (".safetensors", "tokenizer.json")
"""What the Hub would ask to have sent as LFS objects."""


class HubServer:
    """A context manager; ``endpoint`` is its address."""

    def __init__(self, *, owner: str = "alice", token: str = "hf_" + "a1" * 17) -> None:
        self.owner, self.token = owner, token
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.revisions: dict[tuple[str, str], dict[str, bytes]] = {}
        """Files of other revisions than main, by repository and name."""
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

    def at(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision, by name or commit."""
        named = {"main": self.files[repo], **{name: of for (each, name), of in self.revisions.items() if each == repo}}
        return next((of for name, of in named.items() if revision in (name, commit_of(of))), None)

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

    def do_HEAD(self) -> None:
        self._note()
        self._fetch(with_content=False)

    def do_GET(self) -> None:
        hub = self.server_state
        self._note()
        if self._fetch(with_content=True) or self._list() or not self._allowed():
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

    def _fetch(self, *, with_content: bool) -> bool:
        """Answers a request for a file; whether it was one."""
        hub = self.server_state
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if found is None:
            return False
        repo, revision, path = found.groups()
        files = hub.at(repo, revision) if hub.private.get(repo) is False else None
        if files is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}, body=with_content)
            return True
        commit = {"X-Repo-Commit": commit_of(files)}
        if path not in files:
            headers = {**commit, "X-Error-Code": "EntryNotFound"}
            self._answer({"error": "Entry not found"}, 404, headers, body=with_content)
            return True
        content = files[path]
        headers = {**commit, "ETag": f'"{_oid(content, large=path.endswith(LARGE))}"', "Accept-Ranges": "none"}
        self._answer(content, 200, headers, kind="application/octet-stream", body=with_content)
        return True

    def _list(self) -> bool:
        """Answers a request for the files of a revision; whether it was one."""
        hub = self.server_state
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)/?(?:\?.*)?", self.path)
        files = hub.at(found[1], found[2]) if found and hub.private.get(found[1]) is False else None
        if files is None:
            return False
        oids = {path: str(_oid(content, large=path.endswith(LARGE))) for path, content in files.items()}
        self._answer(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": oids[path],
                    **(
                        {"lfs": {"oid": oids[path], "size": len(content), "pointerSize": 1}}
                        if path.endswith(LARGE)
                        else {}
                    ),
                }
                for path, content in files.items()
            ]
        )
        return True

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
        self,
        said: Any,
        status: int = 200,
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
        *,
        body: bool = True,
    ) -> None:
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
