"""Files of JSON lines in a run directory that evaluations add to.

Every line has a version. They are written anew as a whole, so they appear complete or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from data.files import replacing

T = TypeVar("T")


def write_lines(path: Path, entries: Iterable[Any], version: int, drop: Callable[[Any], bool], read: Any) -> None:
    """Adds entries to a file.

    Args:
        path: the file, which may not be there yet.
        entries: dataclasses.
        version: of the format.
        drop: whether an entry that is there gives way to the new ones.
        read: maps a parsed line to an entry, see ``read_lines``.

    Raises:
        ValueError: the file that is there can't be read.
    """
    with replacing(path) as file:
        if path.exists():
            for entry in read_lines(path, version, read):
                if not drop(entry):
                    file.write(_line(entry, version))
        for entry in entries:
            file.write(_line(entry, version))


def read_lines(path: Path, version: int, read: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """The entries of a file, one at a time; none where there is no file.

    Raises:
        ValueError: in one sentence, if a line is not JSON, has another version, or lacks something.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"line {number} of {path}"
            try:
                body = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(body, dict) or body.get("version") != version:
                found = body.get("version") if isinstance(body, dict) else None
                raise ValueError(f"{where} has version {found!r}, and this code reads version {version}")
            try:
                yield read({key: value for key, value in body.items() if key != "version"})
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{where} lacks something or holds a wrong type: {error!r}") from error


def _line(entry: Any, version: int) -> bytes:
    text = json.dumps({"version": version, **asdict(entry)}, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode("utf-8", "replace")  # a lone surrogate is no text
