"""Streams on disk: the first rows of a dataset too large to download, written once and then read like a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from data.errors import DataError
from data.store import cache_dir, digest


def spooled(
    request: list[Any], version: str | None, limit: int, name: str, rows: Callable[[], Generator[Any, None, None]]
) -> Path:
    """A file with the first rows of a stream, one JSON value per line.

    Args:
        request: what identifies the dataset: JSON-able.
        version: of its content; None if it can't be had (the network is down), and then the newest file will do.
        limit: rows to keep.
        name: the dataset, for messages.
        rows: opens the stream; only called if no file is there yet.
    Raises:
        DataError: a value that JSON can't hold.
    """
    folder = cache_dir() / "spool"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = digest("spool", request, limit)
    if version is None and (found := sorted(folder.glob(f"{wanted}-*.jsonl"), key=lambda path: path.stat().st_mtime)):
        return found[-1]
    path = folder / f"{wanted}-{digest(version)}.jsonl"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            part = path.with_suffix(".part")
            try:
                with part.open("w", encoding="utf-8") as file, closing(rows()) as stream:
                    file.writelines(_line(row, i, name) for i, row in enumerate(islice(stream, limit)))
                os.replace(part, path)  # appears complete or not at all
            finally:
                part.unlink(missing_ok=True)
    return path


def _line(row: Any, index: int, name: str) -> str:
    try:
        return json.dumps(row) + "\n"
    except (TypeError, ValueError):
        column, value = _unwritable(row)
        raise DataError(
            f"{name}, row {index}: column {column!r} holds {value}, which a spooled stream can't keep (JSON has no "
            "such type); take the column out of the data, or download the data whole, without data.streaming"
        ) from None


def _unwritable(row: Any) -> tuple[str, str]:
    """The first column that JSON can't hold, and the type of what is in it."""
    for column, value in row.items() if isinstance(row, dict) else []:
        found: list[str] = []

        def note(inner: Any, found: list[str] = found) -> None:
            found.append(type(inner).__name__)

        try:
            json.dumps({column: value}, default=note)
        except (TypeError, ValueError):
            return str(column), type(value).__name__
        if found:
            return str(column), found[0]
    return "", type(row).__name__
