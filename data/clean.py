"""A dataset without the rows that filters remove, in the format it came in, with a manifest of what left and why."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.doctor import versions
from data.errors import DataError
from data.filters import FILTERS
from data.formats import RowProblem
from data.gathering import DataSpec, load
from data.reading import read
from data.rowstore import RowStore, RowView
from data.sources import LoadedRows, Source
from data.store import cache_dir
from data.workers import Workers

MANIFEST = "manifest.json"
VERSION = 1
"""Of the manifest."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeftRow:
    """A row that a filter with a model removes."""

    source: str
    """Name of the dataset."""
    index: int
    """Number of the row in it."""
    reason: str
    score: float
    """For which it leaves."""


def write_clean(
    spec: DataSpec,
    folder: Path,
    *,
    command: str = "",
    workers: Workers | None = None,
    judged: Sequence[Any] = (),
    left: Sequence[LeftRow] = (),
) -> dict[str, Any]:
    """Writes the training rows that the spec's filters leave, and the evaluation set as it is.

    The files hold the raw rows as JSON lines, in their order, with all their columns: ``train.jsonl``, or one
    ``train-<number>.jsonl`` for each of several datasets, and ``eval.jsonl`` where there is an evaluation set. Rows
    that no run could use leave too. The folder is there complete or not at all; the same input gives the same bytes.

    Args:
        spec: what to read, and by which filters.
        folder: new, empty, or written by this function before.
        command: the command line, for the manifest.
        workers: look at large datasets.
        judged: the filters that needed a model, for the manifest.
        left: the rows that those remove.
    Returns:
        What the manifest holds.
    Raises:
        DataError: the data can't be read, a filter does not fit it, or the folder holds something else.
    """
    refuse_folder(folder)
    own = Workers() if workers is None else workers
    with own, RowStore(cache_dir() / "rows") as store:
        loaded, held = load(spec, own, store)
        loaded = [_without(each, left) for each in loaded]
    scores = {(each.source, each.index): each.score for each in left}
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        names = ["train.jsonl"] if len(loaded) == 1 else [f"train-{i}.jsonl" for i in range(len(loaded))]
        written = [
            _write(part / name, source, each, spec.max_rows, scores)
            for name, source, each in zip(names, spec.train, loaded, strict=True)
        ]
        if spec.eval is not None:
            written.append(_write(part / "eval.jsonl", spec.eval, held[0], spec.max_rows, {}, every=True))
        manifest = {
            "version": VERSION,
            "command": command,
            "filters": [{"name": FILTERS.name_of(each), **_keys(each)} for each in (*spec.filters, *judged)],
            "files": written,
            "versions": versions(),
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            folder.replace(old / "old")
            part.replace(folder)
            shutil.rmtree(old)
        else:
            part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return manifest


def refuse_folder(folder: Path) -> None:
    """Raises ``DataError`` if the folder holds something that is not a cleaned dataset."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--write {folder}: that is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise DataError(f"--write {folder}: the folder holds other files; name a new one, or empty it")


def _keys(each: Any) -> dict[str, Any]:
    return {key.name: getattr(each, key.name) for key in dataclasses.fields(each)}


def _without(loaded: LoadedRows, left: Sequence[LeftRow]) -> LoadedRows:
    why = {each.index: each.reason for each in left if each.source == loaded.source}
    if not why:
        return loaded
    assert isinstance(loaded.rows, RowView)
    stay = [place for place, row in enumerate(loaded.rows) if row.index not in why]
    problems = [RowProblem(source=loaded.source, index=index, reason=reason) for index, reason in why.items()]
    rows = loaded.rows.take(np.array(stay, dtype=np.int64))
    return dataclasses.replace(loaded, rows=rows, problems=[*loaded.problems, *problems])


def _write(
    path: Path,
    source: Source,
    loaded: LoadedRows,
    limit: int | None,
    scores: Mapping[tuple[str, int], float],
    *,
    every: bool = False,
) -> dict[str, Any]:
    why = {} if every else {each.index: each.reason for each in loaded.problems}
    read_hash, kept_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
    count = kept = 0
    with path.open("wb") as file:
        for index, raw in enumerate(_raws(source, limit)):
            line = _line(raw)
            read_hash.update(line)
            count += 1
            if index not in why:
                kept_hash.update(line)
                file.write(line)
                kept += 1
    if not every and (kept != len(loaded.rows) or count != kept + len(why)):
        raise DataError(f"{source.dataset_name}: the rows changed while they were cleaned; clean them again")
    return {
        "file": path.name,
        "source": source.dataset_name,
        "split": source.split,
        "format": loaded.format,
        "source_hash": read_hash.hexdigest(),
        "hash": kept_hash.hexdigest(),
        "rows_read": count,
        "rows_kept": kept,
        "left": [
            {"row": f"{source.dataset_name}, row {index}", "why": why[index], **_score(scores, source, index)}
            for index in sorted(why)
        ],
    }


def _score(scores: Mapping[tuple[str, int], float], source: Source, index: int) -> dict[str, float]:
    key = (source.dataset_name, index)
    return {"score": scores[key]} if key in scores else {}


def _raws(source: Source, limit: int | None) -> Iterator[Any]:
    return read(source.dataset_name, split=source.split, config=source.config, streaming=source.streaming, limit=limit)


def _line(raw: Any) -> bytes:
    try:
        return (json.dumps(raw, ensure_ascii=False, default=_plain) + "\n").encode()
    except UnicodeEncodeError:  # half of a character, which JSON can only hold escaped
        return (json.dumps(raw, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    """What Arrow has and JSON does not."""
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Sequence, np.ndarray)):
        return list(value)
    return str(value)
