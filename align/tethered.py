"""Runs a command for as long as the process that asked for it lives, and leaves nothing of it behind.

    python -IS align/tethered.py COMMAND …      # stdin is a pipe that the owner holds open

Closing the pipe ends the command; so does the end of its owner, whatever that was: an exception, SIGTERM, SIGKILL. The
command leads a process group, all of which is asked to end and killed where it does not. The first line on stdout is
the number of that group; the command's own output goes to stderr. The exit status is the command's.

Run as a file, with the standard library alone, so that it starts at once and wherever its owner was started.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE = 20.0
"""Seconds that a command has to end when it is asked to."""
EVERY = 0.2
"""Seconds between two looks at command and owner."""
LEFT = 5.0
"""Seconds that the rest of a killed group has to be gone."""


def main(command: Sequence[str]) -> int:
    """Runs a command until it ends or is let go.

    Returns:
        Its exit status, as shells have it: 128 and the signal's number where it was killed.
    """
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner = os.getppid()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True) as child:
        print(child.pid, flush=True)
        while child.poll() is None and not asked and os.getppid() == owner and not _let_go():
            pass
        if child.poll() is None:
            _send(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
        # What the command started may outlive it, and hold a GPU's memory.
        deadline = time.monotonic() + LEFT
        while _send(child.pid, signal.SIGKILL) and time.monotonic() < deadline:
            child.poll()
            time.sleep(EVERY / 4)
        status = child.wait()
    return 128 - status if status < 0 else status


def _let_go() -> bool:
    """Whether the pipe was closed; waits a moment for it."""
    readable, _, _ = select.select([0], [], [], EVERY)
    return bool(readable) and os.read(0, 1) == b""


def _send(group: int, number: int) -> bool:
    """Whether there was anybody left in the group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
