"""Replies on disk, so that no question is paid for twice: JSON lines that are only ever appended to."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from align.completions import Reply
from align.errors import RunError


class ReplyCache:
    """The replies of one file; several threads and processes may use it.

    A line that a killed process left unfinished is passed over, and begun anew after it.

    Args:
        path: made when the first reply is put there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        self._look()

    @property
    def answered(self) -> bool:
        """Whether there is any reply."""
        return bool(self._places)

    @staticmethod
    def key(question: Mapping[str, Any]) -> str:
        """32 hexadecimal digits: of everything that a reply depends on."""
        return xxhash.xxh3_128_hexdigest(json.dumps(question, sort_keys=True, ensure_ascii=False).encode())

    def get(self, key: str) -> Reply | None:
        """The reply to a question, if it was put there before."""
        with self._lock:
            place = self._places.get(key)
        if place is None:
            return None
        with self.path.open("rb") as file:
            found = json.loads(os.pread(file.fileno(), place[1], place[0]))
        return Reply(found["text"], found["finish_reason"])

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply.

        Raises:
            RunError: the file can't be written.
        """
        values = {"key": key, "text": reply.text, "finish_reason": reply.finish_reason}
        line = json.dumps(values).encode() + b"\n"  # ASCII: replies may hold half of a surrogate pair
        try:
            with self._lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    end = file.seek(0, os.SEEK_END)
                    torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
                    file.write(b"\n" + line if torn else line)
                    file.flush()
                    os.fsync(file.fileno())
                    self._places[key] = (end + torn, len(line))
        except OSError as error:
            raise RunError(
                f"judge: can't write {self.path} ({error.strerror}); make room, or set ALIGN_CACHE"
            ) from None

    def _look(self) -> None:
        if not self.path.is_file():
            return
        place = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    values = json.loads(line)
                    known = isinstance(values["text"], str) and isinstance(values["finish_reason"], str)
                    if known and line.endswith(b"\n"):
                        self._places[values["key"]] = (place, len(line))
                except (ValueError, LookupError, TypeError):
                    pass  # torn
                place += len(line)
