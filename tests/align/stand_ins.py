"""What is started in place of vLLM's server, and what has become of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from align import completions, local_server
from tests.support import REPOSITORY


class StandIns:
    """Lets ``stand_in_server`` be started where vLLM's server would be.

    Args:
        folder: gets caches, logs, and a file of each process.
        monkeypatch: takes all of it back.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "stand_ins"
        self.folder.mkdir()
        (folder / "logs").mkdir()
        monkeypatch.setenv("STAND_IN", str(self.folder))
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        monkeypatch.setenv("ALIGN_CACHE", str(folder / "cache"))
        monkeypatch.setattr("tempfile.tempdir", str(folder / "logs"))
        monkeypatch.setenv("TMPDIR", str(folder / "logs"))  # of other processes
        monkeypatch.setattr(completions, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(local_server, "PROGRAM", (sys.executable, "-m", "tests.align.stand_in_server"))
        monkeypatch.setattr(local_server, "installed", lambda: "0.30.0")

    def do(self, how: str) -> None:
        """What those that are started from now on do; see ``stand_in_server``."""
        (self.folder / "how").write_text(how)

    @property
    def started(self) -> list[list[str]]:
        """What each server was started with."""
        found = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.pid"))]
        return [words for words in found if words]

    @property
    def alive(self) -> list[int]:
        """Servers, and what they have started."""
        return [number for path in self.folder.glob("*.pid") if _running(number := int(path.stem))]

    @property
    def logs(self) -> list[Path]:
        """Logs that were left."""
        return list((self.folder.parent / "logs").iterdir())


def _running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
