"""A server on this machine that speaks OpenAI's protocol of chat completions, and can be told to misbehave."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], str | None]


def better(body: dict[str, Any]) -> str:
    """A judge that prefers the answer with more exclamation marks, and says much better from two more on."""
    first, second = shown(body)
    more = first.count("!") - second.count("!")
    verdict = "A=B" if more == 0 else {1: "A>B", -1: "B>A"}.get(more) or ("A>>B" if more > 0 else "B>>A")
    return f"A has {first.count('!')} and B {second.count('!')}.\nVerdict: [[{verdict}]]"


def shown(body: dict[str, Any]) -> list[str]:
    """The answers between their marks."""
    asked = body["messages"][-1]["content"]
    return [match[2] for match in re.finditer(r"<(answer(?:_[ab])?)>\n(.*?)\n</\1>", asked, re.DOTALL)]


class JudgeServer:
    """A context manager; ``base_url`` is its address.

    Args:
        answer: the text of a reply to a request's body; None writes null.
        faults: what is done instead of answering, one request each: a status, ``garbage`` (no JSON), ``empty`` (JSON of
            something else), ``close`` (the connection), ``slow`` (a second before the answer).
        headers: sent with statuses that are faults.
        key: the key that has to be sent.
        port: to listen on; 0 takes a free one.
    """

    def __init__(
        self,
        answer: Answer = better,
        *,
        faults: tuple[int | str, ...] = (),
        headers: dict[str, str] | None = None,
        key: str | None = None,
        port: int = 0,
    ) -> None:
        self.answer, self.headers, self.key = answer, headers or {}, key
        self.faults: list[int | str] = list(faults)
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        judge = self

        class Handler(_Handler):
            state = judge

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that has given up is no fault of ours."""

        self._server = Quiet(("127.0.0.1", port), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: JudgeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        ready = self.path == "/health"
        self._send(200 if ready else 404, {} if ready else {"error": {"message": f"no {self.path} here"}})

    def do_POST(self) -> None:
        judge = self.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.bodies.append(body)
            judge.times.append(time.monotonic())
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
            fault = judge.faults.pop(0) if judge.faults else None
        try:
            self._respond(judge, body, fault)
        finally:
            with judge.lock:
                judge.at_once -= 1

    def _respond(self, judge: JudgeServer, body: dict[str, Any], fault: int | str | None) -> None:
        if fault == "close":
            self.connection.close()
            return
        if fault == "slow":
            time.sleep(1.0)
        if judge.key is not None and self.headers.get("Authorization") != f"Bearer {judge.key}":
            self._send(401, {"error": {"message": f"Incorrect key: {self.headers.get('Authorization')}"}})
        elif self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"no {self.path} here"}})
        elif isinstance(fault, int):
            self._send(fault, {"error": {"message": f"the fault {fault}"}}, judge.headers)
        elif fault == "garbage":
            self._send(200, "<html>busy</html>")
        elif fault == "empty":
            self._send(200, {"choices": []})
        else:
            choice = {"message": {"role": "assistant", "content": judge.answer(body)}, "finish_reason": "stop"}
            self._send(200, {"id": "x", "model": body["model"], "choices": [choice]})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
