"""Worker processes: functions of this package on batches, on all cores, results in order.

Each worker is a fresh interpreter that reads jobs from its standard input and writes results to its standard output. So
it runs nothing of the program that started it (multiprocessing's spawn imports that program's main module again), holds
no locks copied from threads (fork does), and ends when its parent does, however that ends. It imports neither torch nor
the objectives' formulas, which would take seconds and 200 MB in every one of them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import IO, Any

ALONE = 5
"""Batches that this process does by itself: less would be done before workers have started."""
START = "import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); from data.workers import serve; serve()"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes that are started when there is enough to do, and end with the ``with`` block.

    Args:
        number: how many; default: one for each core, none where there is one core.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = (cores() if cores() > 1 else 0) if number is None else number
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: ThreadPoolExecutor | None = None
        self._has: dict[int, bytes] = {}
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # a job that was being written
                    pipe.close()

    def map(self, function: Callable[[Any, Any], Any], shared: Any, jobs: Iterable[Any]) -> Iterator[Any]:
        """``function(shared, job)`` of every job, in their order. Few jobs are done in this process.

        Args:
            function: of a module that workers can import.
            shared: what all jobs need; picklable, or all jobs are done here.
            jobs: asked for as they are needed, so that they need not all be in memory.
        Raises:
            Exception: what the first job that fails raises; before it come the results of those before.
        """
        jobs = iter(jobs)
        first = list(islice(jobs, ALONE + 1))
        raw = self._shared(function, shared) if self.number and len(first) > ALONE else None
        if raw is None:
            for job in _chained(first, jobs):
                yield function(shared, job)
            return
        self._start()
        assert self._threads is not None
        waiting: deque[Future[Any]] = deque()
        fault: BaseException | None = None
        source = _chained(first, jobs)
        while True:
            while fault is None and len(waiting) < 2 * self.number:
                try:
                    waiting.append(self._threads.submit(self._ask, function, shared, raw, next(source)))
                except StopIteration:
                    break
                except Exception as error:  # comes after what jobs before it raise
                    fault = error
            if not waiting:
                break
            yield waiting.popleft().result()
        if fault is not None:
            raise fault

    def _shared(self, function: Callable[..., Any], shared: Any) -> bytes | None:
        try:
            return pickle.dumps((function.__module__, function.__name__, shared), protocol=5)
        except Exception:  # a tokenizer of someone's own, say
            return None

    def _start(self) -> None:
        if self._processes:
            return
        self._threads = ThreadPoolExecutor(self.number)
        # One thread each: every core already has a process.
        alone = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        for _ in range(self.number):
            process = subprocess.Popen(
                [sys.executable, "-c", START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **alone},
                start_new_session=True,  # Ctrl-C is for the parent alone, which ends its workers
            )
            assert process.stdin is not None
            pickle.dump(sys.path, process.stdin)
            process.stdin.flush()
            self._processes.append(process)
            self._free.put(process)

    def _ask(self, function: Callable[[Any, Any], Any], shared: Any, raw: bytes, job: Any) -> Any:
        try:
            packed = pickle.dumps(job, protocol=5)
        except Exception:  # a column of things that can't be sent, which may not even be read
            return function(shared, job)
        process = self._free.get()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            # What all jobs share (a tokenizer, megabytes) is sent once.
            _send(process.stdin, b"" if self._has.get(process.pid) is raw else raw)
            self._has[process.pid] = raw
            _send(process.stdin, packed)
            succeeded, result = pickle.loads(_receive(process.stdout))
        except (EOFError, BrokenPipeError):
            raise RuntimeError(
                f"a worker process ended while it prepared data (exit status {process.wait()}); out of memory?"
            ) from None
        finally:
            self._free.put(process)
        if not succeeded:
            raise result
        return result


def _chained(first: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    while first:
        yield first.pop(0)
    yield from rest


def _send(pipe: IO[bytes], raw: bytes) -> None:
    pipe.write(len(raw).to_bytes(8, "little"))
    pipe.write(raw)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    length = int.from_bytes(_exactly(pipe, 8), "little")
    return _exactly(pipe, length)


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    raw = pipe.read(length)
    if len(raw) < length:
        raise EOFError
    return raw


def serve() -> None:
    """What a worker does: jobs from standard input, results to standard output, until input ends."""
    # The package's own module imports every objective and with them torch; rows and registries are all it takes here.
    spec = importlib.util.find_spec("objectives")
    assert spec is not None
    package = types.ModuleType("objectives")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["objectives"] = package
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between results
    function: Callable[..., Any] | None = None
    shared: Any = None
    while True:
        try:
            raw, job = _receive(jobs), _receive(jobs)
        except EOFError:
            return
        try:
            if raw:
                module, name, shared = pickle.loads(raw)
                function = getattr(importlib.import_module(module), name)
            assert function is not None
            answer = pickle.dumps((True, function(shared, pickle.loads(job))), protocol=5)
        except BaseException as error:
            answer = _failure(error)
        try:
            _send(results, answer)
        except BrokenPipeError:  # the parent has ended
            return


def _failure(error: BaseException) -> bytes:
    try:
        raw = pickle.dumps((False, error), protocol=5)
        pickle.loads(raw)
    except Exception:  # an exception whose class wants other arguments
        raw = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")), protocol=5)
    return raw
