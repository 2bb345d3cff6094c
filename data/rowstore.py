"""Rows out of the way: packed into bytes, on disk once they are many, with a few numbers of each kept in memory.

A million rows as Python objects take gigabytes. Here a row costs 64 bytes of memory, which say which rows have the same
prompt, the same content, a label and which legs; whoever needs the text unpacks one row at a time.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import xxhash

from objectives.rows import Candidate, Row, Text

BATCH = 1000
"""Rows handled at a time."""
IN_MEMORY = 5 * BATCH
"""Rows that are kept in memory; more go to disk."""


class Kind(NamedTuple):
    """What a row offers."""

    source: str
    legs: tuple[str, ...]
    labelled: bool
    scored: bool
    """Whether it has candidates."""
    scores: tuple[str, ...]
    text: bool
    """Whether the prompt is text rather than messages."""


def prompt_key(prompt: Text) -> str:
    """The same text for the same prompt, whatever the order of its messages' keys."""
    return prompt if isinstance(prompt, str) else "\0" + json.dumps(prompt, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows as bytes, and what is known of each."""

    blob: bytes
    ends: np.ndarray
    """Where each row's bytes end, (row,)."""
    prompts: np.ndarray
    """128 bits of a hash of the prompt, (row, 2)."""
    contents: np.ndarray
    """128 bits of a hash of everything, (row, 2)."""
    labels: np.ndarray
    """1 and 0, and −1 without a label, (row,)."""
    kinds: np.ndarray
    """Number of each row's kind in ``known``, (row,)."""
    known: tuple[Kind, ...]


def pack_rows(rows: Iterable[Row]) -> Packed:
    """Rows as bytes: the same bytes for the same content."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5)
    pickler.fast = True  # without back references, which would make bytes depend on which objects are the same one
    ends: list[int] = []
    prompts: list[bytes] = []
    labels: list[int] = []
    kinds: list[int] = []
    known: dict[Kind, int] = {}
    for row in rows:
        pickler.dump(
            (
                row.prompt,
                dict(row.responses),
                dict(row.scores),
                row.label,
                tuple((each.text, each.score, dict(each.rewards), each.mean_logp) for each in row.candidates),
                row.group,
                row.source,
                row.index,
            )
        )
        ends.append(file.tell())
        prompts.append(_text_digest(row.prompt))
        labels.append(-1 if row.label is None else int(row.label))
        labelled, text = row.label is not None, isinstance(row.prompt, str)
        kind = Kind(row.source, tuple(row.responses), labelled, bool(row.candidates), tuple(row.scores), text)
        kinds.append(known.setdefault(kind, len(known)))
    blob = file.getvalue()
    view, starts = memoryview(blob), [0, *ends[:-1]]
    contents = [xxhash.xxh3_128_digest(view[start:end]) for start, end in zip(starts, ends, strict=False)]
    return Packed(
        blob,
        np.array(ends, dtype=np.int64),
        _hashes(prompts),
        _hashes(contents),
        np.array(labels, dtype=np.int8),
        np.array(kinds, dtype=np.int32),
        tuple(known),
    )


def _text_digest(prompt: Text) -> bytes:
    return xxhash.xxh3_128_digest(prompt_key(prompt).encode("utf-8", "surrogatepass"))


def text_hashes(prompts: Iterable[Text]) -> np.ndarray:
    """128 bits of each prompt as it stands in the dataset, (row, 2)."""
    return _hashes([_text_digest(prompt) for prompt in prompts])


def _hashes(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)


def unpack_row(raw: bytes | memoryview) -> Row:
    """The row that ``pack_rows`` wrote."""
    prompt, responses, scores, label, candidates, group, source, index = pickle.loads(raw)
    return Row(
        prompt=prompt,
        responses=responses,
        scores=scores,
        label=label,
        candidates=tuple(
            Candidate(text=text, score=score, rewards=rewards, mean_logp=mean_logp)
            for text, score, rewards, mean_logp in candidates
        ),
        group=group,
        source=source,
        index=index,
    )


def _unpacked(file: int, starts: np.ndarray, ends: np.ndarray) -> Iterator[Row]:
    cuts = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    for run in np.split(np.arange(len(starts)), cuts) if len(starts) else []:
        first = int(starts[run[0]])
        view = memoryview(os.pread(file, int(ends[run[-1]]) - first, first))
        for i in run.tolist():
            yield unpack_row(view[int(starts[i]) - first : int(ends[i]) - first])


class RowStore:
    """All rows of a preparation, appended one batch after the other. What is on disk goes when it does, or at the end
    of a ``with`` block.

    Args:
        folder: where a temporary folder is made for rows that are too many to be kept in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.path: str | None = None
        """Of the file with the bytes of all rows, once they are many."""
        self.kinds: dict[Kind, int] = {}
        self._folder = folder
        self._blob = bytearray()
        self._columns: list[list[np.ndarray]] = [[], [], [], [], []]
        self._joined: list[np.ndarray] | None = None
        self._length = self._bytes = 0
        self._end: list[Callable[[], object]] = []

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._end:
            end()

    def __len__(self) -> int:
        return self._length

    def add(self, packed: Packed) -> RowView:
        """Appends rows."""
        kinds = np.array([self.kinds.setdefault(kind, len(self.kinds)) for kind in packed.known], dtype=np.int32)
        added = (packed.ends + self._bytes, packed.prompts, packed.contents, packed.labels, kinds[packed.kinds])
        for column, values in zip(self._columns, added, strict=True):
            column.append(values)
        self._joined = None
        first, self._length = self._length, self._length + len(packed.ends)
        self._bytes += len(packed.blob)
        if self.path is None and self._length > IN_MEMORY:
            self._spill()
        if self.path is None:
            self._blob += packed.blob
        else:
            self._file.write(packed.blob)
        return RowView(self, np.arange(first, self._length))

    def add_rows(self, rows: Iterable[Row]) -> RowView:
        """Appends rows, a batch at a time."""
        first, batch = self._length, []
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH:
                self.add(pack_rows(batch))
                batch = []
        if batch:
            self.add(pack_rows(batch))
        return RowView(self, np.arange(first, self._length))

    def _spill(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".store-", dir=self._folder)
        self._end.append(weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True))
        self.path = os.path.join(folder, "rows")
        self._file = open(self.path, "w+b", buffering=0)  # noqa: SIM115  # as long as the store; unbuffered: workers read it
        self._end.append(weakref.finalize(self, self._file.close))
        self._file.write(self._blob)
        self._blob = bytearray()

    def column(self, number: int) -> np.ndarray:
        """One number of every row, in the order of ``Packed``'s arrays: ends, prompts, contents, labels, kinds."""
        if self._joined is None:
            empty = pack_rows([])
            none = (empty.ends, empty.prompts, empty.contents, empty.labels, empty.kinds)
            self._joined = [
                np.concatenate([nothing, *parts]) for nothing, parts in zip(none, self._columns, strict=True)
            ]
            self._columns = [[each] for each in self._joined]
        return self._joined[number]

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the bytes of rows begin and end."""
        ends = self.column(0)
        starts = np.where(numbers > 0, ends[numbers - 1], 0)
        return starts, ends[numbers]

    def rows(self, numbers: np.ndarray) -> Iterator[Row]:
        """Unpacks rows, one after the other."""
        starts, ends = self.places(numbers)
        for first in range(0, len(numbers), BATCH):
            batch = slice(first, first + BATCH)
            if self.path is None:
                places = zip(starts[batch].tolist(), ends[batch].tolist(), strict=True)
                yield from [unpack_row(bytes(self._blob[start:end])) for start, end in places]
            else:
                yield from _unpacked(self._file.fileno(), starts[batch], ends[batch])


class RowView(Sequence[Row]):
    """Some rows of a store, in any order, each as often as its number occurs.

    Args:
        store: which.
        numbers: of its rows.
        partners: for each row another one, whose completion is its mismatched response.
    """

    def __init__(self, store: RowStore, numbers: np.ndarray, partners: np.ndarray | None = None) -> None:
        self.store, self.numbers, self.partners = store, numbers, partners

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, item: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, item: slice) -> RowView: ...
    def __getitem__(self, item: SupportsIndex | slice) -> Row | RowView:
        if isinstance(item, slice):
            return RowView(self.store, self.numbers[item], None if self.partners is None else self.partners[item])
        place = range(len(self))[item]
        return next(iter(self[place : place + 1]))

    def __iter__(self) -> Iterator[Row]:
        rows = self.store.rows(self.numbers)
        return rows if self.partners is None else with_partners(rows, self.store.rows(self.partners))

    def take(self, places: np.ndarray) -> RowView:
        """The rows at these places."""
        return RowView(self.store, self.numbers[places], None if self.partners is None else self.partners[places])

    def prompts(self) -> np.ndarray:
        """128 bits that say which rows have the same prompt, (row, 2)."""
        return self.store.column(1)[self.numbers]

    def contents(self) -> list[np.ndarray]:
        """Hashes of all that the rows hold."""
        numbers = [self.numbers] if self.partners is None else [self.numbers, self.partners]
        return [self.store.column(2)[each] for each in numbers]

    def labels(self) -> np.ndarray:
        """1 and 0, and −1 without a label, (row,)."""
        return self.store.column(3)[self.numbers]

    def kinds(self) -> list[Kind]:
        """What rows offer, each once, in the order in which they come."""
        found, _ = self._first_of_kinds()
        return found

    def first_of_kinds(self) -> RowView:
        """The first row of each kind: what one has to look at to know what all rows have."""
        return self.take(self._first_of_kinds()[1])

    def _first_of_kinds(self) -> tuple[list[Kind], np.ndarray]:
        which, places = np.unique(self.store.column(4)[self.numbers], return_index=True)
        order, names = np.argsort(places), list(self.store.kinds)
        return [names[i] for i in which[order].tolist()], places[order]

    def of_kinds(self, chosen: Callable[[Kind], bool]) -> np.ndarray:
        """Whether each row is of a kind that is chosen, (row,)."""
        which = np.array([chosen(kind) for kind in self.store.kinds], dtype=bool)
        return which[self.store.column(4)[self.numbers]]

    def sources(self, size: int) -> Iterator[Any]:
        """The rows for other processes, a batch at a time: where they lie on disk, or the rows themselves."""
        path = self.store.path
        if path is None:
            yield from (list(self[start : start + size]) for start in range(0, len(self), size))
            return
        places = [
            *self.store.places(self.numbers),
            *([] if self.partners is None else self.store.places(self.partners)),
        ]
        for start in range(0, len(self), size):
            yield path, [each[start : start + size] for each in places]


def rows_from(source: Any) -> list[Row]:
    """The rows of one batch of ``RowView.sources``."""
    if isinstance(source, list):
        return source
    path, (starts, ends, *others) = source
    rows = _read(path, starts, ends)
    return list(with_partners(rows, _read(path, *others)) if others else rows)


def _read(path: str, starts: np.ndarray, ends: np.ndarray) -> Iterator[Row]:
    with open(path, "rb") as file:
        yield from _unpacked(file.fileno(), starts, ends)


def with_partners(rows: Iterable[Row], others: Iterable[Row]) -> Iterator[Row]:
    """Every row with the completion of another one as its leg ``mismatched``."""
    for row, other in zip(rows, others, strict=True):
        yield replace(row, responses={**row.responses, "mismatched": other.responses["completion"]})


def numbered(hashes: np.ndarray) -> np.ndarray:
    """The same number for the same hash, counted from 0 in the order in which they first come, (row,)."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the first of equal hashes stays first
    ordered = hashes[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.cumsum(new) - 1
    rank = np.empty(int(new.sum()), dtype=np.int64)
    rank[np.argsort(order[new])] = np.arange(len(rank))
    numbers = np.empty(len(hashes), dtype=np.int64)
    numbers[order] = rank[group]
    return numbers
