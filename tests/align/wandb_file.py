"""Reads what W&B writes offline: records of ``run-<id>.wandb``, a log in LevelDB's format."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def raw_records(path: Path) -> Iterator[bytes]:
    """Records in order; those that go over several blocks put together."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece = content[at + HEADER : at + HEADER + length]
        if len(piece) < length:
            return  # still being written
        at += HEADER + length
        if kind in (WHOLE, FIRST):
            parts = piece
        elif kind in (MIDDLE, LAST):
            parts += piece
        else:
            return
        if kind in (WHOLE, LAST):
            yield parts


def records(path: Path, *, within: float = 60.0) -> list[Any]:
    """All records of a run that has ended. W&B's service writes them; a busy machine may be behind the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + within
    while True:
        found = [Record.FromString(raw) for raw in raw_records(path)]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < until, f"{path} has {len(found)} records and no end after {within} s"
        time.sleep(0.1)


def read(path: Path) -> dict[str, Any]:
    """``history`` (a list of mappings), ``alerts`` (title and text), ``run`` (id, project, name) and ``config``."""
    found: dict[str, Any] = {"history": [], "alerts": [], "run": None, "config": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            line: dict[str, Any] = {}
            for item in record.history.item:
                *outer, last = list(item.nested_key) or [item.key]
                inner = line
                for name in outer:
                    inner = inner.setdefault(name, {})
                inner[last] = json.loads(item.value_json)
            found["history"].append(line)
        elif kind == "alert":
            found["alerts"].append((record.alert.title, record.alert.text))
        elif kind == "run":
            found["run"] = (record.run.run_id, record.run.project, record.run.display_name)
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return found
