"""What ends a run before its end: a signal that asks it to, and a process that no longer answers.

SIGTERM   the step under way is finished, a checkpoint written, and the run ends with status 75 ("try again");
          clusters send it before they take a machine away
silence   after ``train.ddp_timeout`` seconds without progress each process says which one it waited for, and in
          what, and ends with status 74: what waits inside a collective operation can't be told otherwise

``leave`` is how a process of ours ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

SAVED = 75
"""Exit status after SIGTERM: a checkpoint is there, and the same command goes on from it."""
HUNG = 74
"""Exit status after silence."""
PATIENCE = 5.0
"""Seconds to find out who is silent."""


class Preempted(Exception):  # noqa: N818  # no error: the run was asked to stop
    """The run has stopped because it was asked to; the message says where it goes on."""


class StopSignal:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Takes SIGTERM for as long as it lasts, where signals can be taken: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._take)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def _take(self, number: int, frame: Any) -> None:
        if not self.asked:
            os.write(2, b"SIGTERM: stopping after this step, with a checkpoint\n")  # print() is not safe in a handler
        self.asked = True


class Watchdog:
    """Knows what every process is doing, and ends this one when nothing moves.

    Args:
        rank: of this process.
        world: number of processes.
        limit: seconds without progress.
        store: shared by the processes: ``set``, ``get`` and ``check``, as of ``torch.distributed.Store``.
        end: what ends the process after its report.
    """

    def __init__(
        self, rank: int, world: int, limit: float, store: Any, end: Callable[[int], object] = os._exit
    ) -> None:
        self.rank, self.world, self.limit, self.store, self.end = rank, world, limit, store, end
        self._doing, self._since = "starting", time.time()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        """Begins to watch."""
        self._tell()
        self._thread.start()

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()

    def note(self, doing: str) -> None:
        """Takes down what this process does next; that is progress."""
        self._doing, self._since = doing, time.time()

    def _tell(self) -> None:
        said = {"doing": self._doing, "since": self._since, "alive": time.time()}
        with contextlib.suppress(RuntimeError):  # the first process, which keeps the store, may be gone
            self.store.set(str(self.rank), json.dumps(said))

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.05, min(self.limit / 8, 10))):
            doing, since, now = self._doing, self._since, time.time()
            self._tell()
            if now - since > self.limit and not self._stopped.is_set():
                print(f"[process {self.rank}] error: {self._told(doing)}", file=sys.stderr, flush=True)
                self.end(HUNG)
                return

    def _told(self, doing: str) -> str:
        """The report; reading what others left may wait for ever as well, where the network is gone."""
        told = [f"no progress in: {doing}, and the other processes can't be reached; look at the network"]
        asking = threading.Thread(target=lambda: told.append(self.report()), daemon=True)
        asking.start()
        asking.join(PATIENCE)
        return told[-1]

    def report(self) -> str:
        """Which process was waited for, and in what."""
        now = time.time()
        others = {rank: self._read(rank) for rank in range(self.world) if rank != self.rank}
        silent = [rank for rank, entry in others.items() if entry is None or now - entry["alive"] > self.limit / 2]
        behind = sorted(others, key=lambda rank: (others[rank] or {"since": 0.0})["since"])
        waited_for = silent or behind[:1]
        told = []
        for rank in waited_for:
            entry = others[rank]
            sign = "never gave a sign of life" if entry is None else f"was last seen in: {entry['doing']}"
            quiet = "" if entry is None or rank not in silent else f", {now - entry['alive']:.0f} s ago"
            told.append(f"process {rank} {sign}{quiet}")
        return (
            f"no progress for {now - self._since:.0f} s (train.ddp_timeout {self.limit:g}) in: {self._doing}; "
            f"{'; '.join(told)}. Look at that machine, then go on with --resume_from_checkpoint last"
        )

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self.store.get(str(rank))) if self.store.check([str(rank)]) else None
        except (RuntimeError, ValueError):
            return None


def watchdog(limit: float) -> Watchdog | None:
    """One for the processes of this run; None where there is only one, which waits for nobody."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    # A connection of its own: the main thread may be waiting on the other.
    store = PrefixStore("align/alive", _get_default_store().clone())  # type: ignore[attr-defined]
    return Watchdog(dist.get_rank(), dist.get_world_size(), limit, store)


_alone = [False]


def alone(main: Callable[[], int]) -> NoReturn:
    """Runs ``main`` in a process that runs nothing besides, which ends by ``leave``.

    Args:
        main: gives the exit status, which is 1 after an exception that nobody caught; it is shown as ever.
    """
    _alone[0] = True
    try:
        status = main()
    except Exception as error:
        if _watched():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    leave(status)


def is_ours() -> bool:
    """Whether this process runs nothing besides us, and will end by ``leave``."""
    return _alone[0]


def _watched() -> bool:
    return sys.gettrace() is not None or sys.getprofile() is not None


def leave(status: int) -> NoReturn:
    """Ends this process after what was registered for its end, without taking Python and its libraries apart.

    That would take two seconds. And a thread of gloo's may be the last to hold a tensor of the last collective
    operation: when it lets go of it while Python takes itself apart, the process aborts (pytorch/pytorch#190489), and
    all that was done counts as failed. A process that a profiler or a debugger watches ends as any other, so that they
    see its end.

    Args:
        status: its exit status.
    """
    if _watched():
        sys.exit(status)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python's own end does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(status)
