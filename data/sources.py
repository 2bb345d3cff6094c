"""Sources: where rows come from. Reads a dataset, recognises its format, converts it to rows, mixes several."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from data.arranging import Conversion, convert_batch, renamed
from data.errors import DataError
from data.formats import COLUMNS, FORMATS, RowProblem, recognise
from data.reading import read
from data.rowstore import BATCH, RowStore, RowView
from data.workers import Workers
from objectives.registry import did_you_mean
from objectives.rows import Row

HEAD = 64
"""Rows looked at to recognise a format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One dataset, and how to read it."""

    dataset_name: str
    """Hub id, or path of a local file or folder (json, jsonl, parquet, arrow, csv, also .gz)."""
    split: str = "train"
    """Which split to read. A single file is a split called train."""
    config: str | None = None
    """Name of the dataset's configuration, where it has several."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column names to theirs, e.g. {prompt: question, chosen: better, rejected: worse}."""
    weight: float = 1.0
    """How often each row occurs in an epoch, > 0: 1 once, 0.5 a random half of the rows, 2 twice."""
    format: str = "auto"
    """How rows are written, by name; auto recognises it."""
    as_chat: bool = False
    """Turn plain strings and HH transcripts into messages."""
    streaming: bool = False
    """Read only the first rows, without downloading the rest, and keep them in the cache. Takes a row limit."""
    attributes: tuple[str, ...] = ()
    """Further columns that an objective reads: scores of a completion, e.g. helpfulness, and those of ``COLUMNS``."""

    def __post_init__(self) -> None:
        if not self.dataset_name.strip():
            raise DataError("data.dataset_name is empty; give a Hub id, or the path of a file or folder")
        _check_weight(self.dataset_name, self.weight)
        if self.format != "auto" and self.format not in FORMATS:
            raise DataError(
                f"data.format: unknown format {self.format!r}{did_you_mean(self.format, ['auto', *FORMATS])} "
                f"(known: auto, {', '.join(FORMATS)})"
            )
        for ours in self.columns:
            known = [*COLUMNS, *self.attributes]
            if ours not in known:
                raise DataError(
                    f"data.columns: {ours!r} is no column of ours{did_you_mean(ours, known)} "
                    f"(known: {', '.join(known)}); write {{ours: theirs}}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRows:
    """What a source gave."""

    source: str
    """``Source.dataset_name``."""
    format: str
    """Name of the format that was recognised."""
    rows: Sequence[Row]
    problems: list[RowProblem]
    """Rows that can't be used, each with its reason. Together with ``rows`` they are all rows that were read."""


def load_rows(
    source: Source, *, limit: int | None = None, store: RowStore | None = None, workers: Workers | None = None
) -> LoadedRows:
    """Reads a source and converts it to rows.

    Args:
        source: the dataset and how to read it.
        limit: read only this many rows of the data, from the first; those with problems count.
        store: takes the rows; else they are a list.
        workers: convert the rows of a large dataset, where a store takes them.
    Raises:
        DataError: the dataset can't be read, is empty, fits no format, has no row without a problem, or is a stream
            without a limit.
    """
    assert limit is None or limit >= 1, limit
    name, config = source.dataset_name, source.config
    raws = read(name, split=source.split, config=config, streaming=source.streaming, limit=limit)
    head = list(islice(raws, HEAD))
    if not head:
        raise DataError(f"{source.dataset_name}: the dataset has no rows in split {source.split!r}; name one that has")
    _check_columns(source, head)
    form = recognise([renamed(raw, source.columns) for raw in head], where=source.dataset_name, name=source.format)
    how = Conversion(
        source=source.dataset_name,
        format=form.name,
        columns=dict(source.columns),
        as_chat=source.as_chat,
        attributes=tuple(source.attributes),
    )
    rows: Sequence[Row]
    if store is None:
        found = list(how.rows(0, chain(head, raws)))
        rows = [row for row in found if isinstance(row, Row)]
        problems = [row for row in found if not isinstance(row, Row)]
    else:
        rows, problems = _stored(how, chain(head, raws), store, workers or Workers(0))
    if not rows:
        raise DataError(
            f"{source.dataset_name}: none of {len(problems)} rows can be used as {form.name} ({form.expects}); "
            f"row {problems[0].index}: {problems[0].reason}; mend the rows, or say what they hold with data.columns"
        )
    return LoadedRows(source=source.dataset_name, format=form.name, rows=rows, problems=problems)


def _stored(
    how: Conversion, raws: Iterator[Any], store: RowStore, workers: Workers
) -> tuple[RowView, list[RowProblem]]:
    first, problems = len(store), list[RowProblem]()
    batches = iter(lambda: list(islice(raws, BATCH)), [])
    for packed, lost in workers.map(convert_batch, how, ((i * BATCH, batch) for i, batch in enumerate(batches))):
        store.add(packed)
        problems += lost
    return RowView(store, np.arange(first, len(store))), problems


def _check_columns(source: Source, head: Sequence[Any]) -> None:
    found = dict.fromkeys(name for raw in head if isinstance(raw, Mapping) for name in raw)
    for ours, theirs in source.columns.items():
        if theirs not in found:
            raise DataError(
                f"{source.dataset_name}: data.columns maps {ours} to {theirs!r}, which is not there"
                f"{did_you_mean(theirs, list(found))} (columns: {', '.join(map(str, found)) or 'none'})"
            )


def mix(loaded: Sequence[tuple[LoadedRows, float]], seed: int) -> list[Row]:
    """Several sources as one list of rows, each row as often as its source's weight says.

    A weight of 2.5 gives two copies of every row and a random half on top, drawn without replacement. Rows keep their
    order, source by source; what is drawn depends on ``seed`` and the source's position alone.

    Raises:
        DataError: a weight is not positive, or so small that no row is left.
    """
    return [
        part.rows[i]
        for position, (part, weight) in enumerate(loaded)
        for i in repeated(part.source, len(part.rows), weight, seed, position)
    ]


def repeated(source: str, rows: int, weight: float, seed: int, position: int) -> Iterator[int]:
    """Which of a source's rows ``mix`` takes, by number.

    Args:
        source: its name, for messages.
        rows: how many it has.
        weight: how often each is taken.
        seed: of what is drawn.
        position: of the source among all.
    Raises:
        DataError: see ``mix``.
    """
    _check_weight(source, weight)
    copies = math.floor(weight)
    extra = round((weight - copies) * rows)
    if rows and copies == 0 and extra == 0:
        raise DataError(f"{source}: weight {weight} of {rows} rows leaves none; raise the weight")
    drawn = random.Random(f"mix/{seed}/{position}").sample(range(rows), extra)
    return chain(*[range(rows)] * copies, sorted(drawn))


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{name}: weight must be a number > 0, not {weight}; leave the dataset out to not use it")
