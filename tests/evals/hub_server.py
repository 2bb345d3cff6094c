"""As much of the Hub's HTTP interface as pushing a model needs, on this machine.

Speaks: whoami, repository creation and lookup, card validation, preupload, LFS batch and upload, commit. Keeps what it
was sent: ``server.files[repo_id][path]`` are the bytes of each file, large ones included.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
        self.fail_commits = False
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
            good = text.startswith("---\n")
            self._answer({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.endpoint}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
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
                hub.files[repo][value["path"]] = hub.large[value["oid"]]

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.server_state.token}":
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
