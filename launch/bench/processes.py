"""A part of a benchmark in a process of its own: what it found, and the most memory that it took."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "RESULT "
EVERY = 0.2
"""Seconds between two looks at memory."""


def tell(found: Mapping[str, Any]) -> None:
    """Prints what a part found, for ``measured``."""
    print(MARK + json.dumps(found), flush=True)


def measured(module: str, words: Sequence[str], what: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Runs ``python -m module words``, which ``tell``s something.

    Args:
        module: to run.
        words: its arguments.
        what: it is called when it fails.
        env: on top of this process's own.
    Returns:
        What was told, and ``peak_mib``: memory of the process and its descendants together (PSS, so that pages they
        share count once), libraries included.
    Raises:
        SystemExit: it told nothing.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(EVERY):
            peak[0] = max(peak[0], _memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    stop.set()
    watcher.join()
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(f"{what} failed:\n{output[-1500:]}{errors[-3000:]}")
    return {**json.loads(lines[0].removeprefix(MARK)), "peak_mib": peak[0] / 2**20}


def _tree(process: int) -> list[int]:
    """A process and its descendants."""
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*"):
        with contextlib.suppress(OSError):
            found += [each for child in (task / "children").read_text().split() for each in _tree(int(child))]
    return found


def _memory(process: int) -> int:
    """Bytes that a process and its descendants take; pages they share count once."""
    total = 0
    for each in _tree(process):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total
