"""Calls that may never end, or take all memory: each in a process that is killed at a time limit and started again.

A signal would interrupt Python between two of its steps only: ``9 ** 9 ** 9`` is one step. Nor would it work off the
main thread.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import select
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

START = "import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); from align.bounded import serve; serve()"
START_SECONDS = 120.0
"""Most time that a process may take to start; busy machines take long to import what answers are read with."""
MEMORY = 4 << 30
"""Most bytes of address space."""
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Failed:
    """A call without a result."""

    why: str


class Pool:
    """Processes that call the functions of one module.

    Args:
        module: importable by name; it should import little. What its ``prepare()`` does counts towards no call's time.
        seconds: most time for one call.
        number: processes, started as they are needed.
    """

    def __init__(self, module: str, *, seconds: float, number: int) -> None:
        assert number >= 1
        self._free: SimpleQueue[_Process] = SimpleQueue()
        self._all = [_Process(module, seconds) for _ in range(number)]
        for process in self._all:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(number)

    def map(self, function: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What each call gives, in order; ``Failed`` where it took too long, ran out of memory or raised."""
        return list(self._threads.map(lambda call: self._call(function, call), calls))

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown()
        for process in self._all:
            process.end()

    def _call(self, function: str, arguments: tuple[Any, ...]) -> Any:
        process = self._free.get()
        try:
            return process.call(function, arguments)
        finally:
            self._free.put(process)


class _Process:
    def __init__(self, module: str, seconds: float) -> None:
        self.module, self.seconds = module, seconds
        self._running: subprocess.Popen[bytes] | None = None
        self._finalizer: Any = None

    def call(self, function: str, arguments: tuple[Any, ...]) -> Any:
        try:
            running = self._started()
            _write(running.stdin, (function, arguments))
            worked, value = _read(running.stdout, self.seconds)
        except TimeoutError:
            self.end()
            return Failed(f"took longer than {self.seconds:g} s")
        except (EOFError, OSError, pickle.UnpicklingError):
            self.end()
            return Failed("its process ended")
        return value if worked else Failed(value)

    def end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._running = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None:
            self._running = subprocess.Popen(
                [sys.executable, "-c", START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what a library complains of is in the result
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the parent alone
            )
            self._finalizer = weakref.finalize(self, _end, self._running)
            assert self._running.stdin is not None
            pickle.dump(sys.path, self._running.stdin)
            _write(self._running.stdin, self.module)
            _read(self._running.stdout, START_SECONDS)
        return self._running


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _write(pipe: IO[bytes] | None, value: Any) -> None:
    assert pipe is not None
    raw = pickle.dumps(value, protocol=5)
    pipe.write(_LENGTH.pack(len(raw)) + raw)
    pipe.flush()


def _read(pipe: IO[bytes] | None, seconds: float) -> Any:
    assert pipe is not None
    deadline = time.monotonic() + seconds
    (length,) = _LENGTH.unpack(_exactly(pipe.fileno(), _LENGTH.size, deadline))
    return pickle.loads(_exactly(pipe.fileno(), length, deadline))


def _exactly(file: int, length: int, deadline: float) -> bytes:
    found = bytearray()
    while len(found) < length:
        if not select.select([file], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise TimeoutError
        part = os.read(file, length - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


# ---- in the process ----


def serve() -> None:
    """Calls what it is asked to until its parent is gone."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what a library prints is no answer
    module: Any = None
    while (asked := _next(sys.stdin.buffer)) is not None:
        if module is None:
            module = importlib.import_module(asked)
            getattr(module, "prepare", lambda: None)()
            _write(answers, True)
            continue
        name, arguments = asked
        try:
            result = True, getattr(module, name)(*arguments)
        except MemoryError:
            result = False, "ran out of memory"
        except Exception as error:
            result = False, f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _write(answers, result)


def _next(pipe: IO[bytes]) -> Any:
    head = pipe.read(_LENGTH.size)
    return pickle.loads(pipe.read(_LENGTH.unpack(head)[0])) if len(head) == _LENGTH.size else None
