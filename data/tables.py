"""Token tables on disk: written a chunk at a time, mapped whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import IO, Any, SupportsIndex, overload

import numpy as np

from data.rowstore import numbered
from data.store import TokenTable
from data.tokens import TokenChunk


class Where(Sequence[tuple[str, int]]):
    """Source and row number of every row, from arrays.

    Args:
        names: of the sources.
        sources: for each row, which of them.
        indices: the row's number there.
    """

    def __init__(self, names: Sequence[str], sources: np.ndarray, indices: np.ndarray) -> None:
        self._names, self._sources, self._indices = names, sources, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, item: SupportsIndex) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, item: slice) -> Where: ...
    def __getitem__(self, item: SupportsIndex | slice) -> tuple[str, int] | Where:
        if isinstance(item, slice):
            return Where(self._names, self._sources[item], self._indices[item])
        return self._names[int(self._sources[index(item)])], int(self._indices[index(item)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list


class Names(Sequence[str]):
    """A name for every row, from an array of numbers.

    Args:
        names: all that occur.
        numbers: for each row, which of them.
    """

    def __init__(self, names: Sequence[str], numbers: np.ndarray) -> None:
        self._names, self._numbers = names, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, item: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> Names: ...
    def __getitem__(self, item: SupportsIndex | slice) -> str | Names:
        if isinstance(item, slice):
            return Names(self._names, self._numbers[item])
        return self._names[int(self._numbers[index(item)])]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list


def _same(one: object, other: object) -> bool:
    return one == other


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rows of training or evaluation."""

    table: TokenTable
    where: Sequence[tuple[str, int]]
    """Source and row number of each row, for messages."""
    prompts: np.ndarray
    """Which prompt each row has, as a number: rows of one prompt form a cluster."""
    groups: Sequence[str] = ()
    """``Row.group`` of each row: what evaluation reports apart; "" where it has none."""
    texts: np.ndarray | None = None
    """128 bits of each row's prompt as it stands in the dataset, (row, 2)."""

    def prompt_id(self, row: int) -> str:
        """The name of a row's prompt, the same whatever the tokenizer; that of ``align.samples.prompt_id``."""
        assert self.texts is not None, "a split that is evaluated knows its prompts"
        return self.texts[row].tobytes().hex()

    def name(self, row: int) -> str:
        """``source, row index``, for messages."""
        source, index = self.where[row]
        return f"{source}, row {index}"

    def take(self, rows: np.ndarray) -> Split:
        """The given rows, in the given order."""
        numbers: list[int] = rows.tolist()
        return Split(
            table=self.table.take(rows),
            where=[self.where[row] for row in numbers],
            prompts=self.prompts[rows],
            groups=[self.groups[row] for row in numbers] if len(self.groups) else (),
            texts=None if self.texts is None else self.texts[rows],
        )

    @staticmethod
    def load(folder: Path) -> Split:
        """Maps what a ``SplitWriter`` wrote."""

        def mapped(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        names = json.loads((folder / "names.json").read_text())
        return Split(
            table=TokenTable.load(folder),
            where=Where(names["sources"], mapped("sources"), mapped("indices")),
            prompts=mapped("prompts"),
            texts=mapped("texts"),
            groups=Names(names["groups"], mapped("groups")),
        )


@dataclass(slots=True)
class _Numbers:
    """Names as numbers, in the order in which they come."""

    known: dict[str, int] = field(default_factory=dict)
    parts: list[np.ndarray] = field(default_factory=list)

    def add(self, names: Sequence[str]) -> None:
        known = self.known
        self.parts.append(np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int32))


class SplitWriter:
    """Writes the rows of one split, a chunk at a time: token ids go to disk at once.

    Args:
        folder: made when the first row comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._lengths: dict[str, list[np.ndarray]] = {}
        self._arrays: dict[str, list[np.ndarray]] = {
            "labels": [],
            "indices": [],
            "prompts": [],
            "rows": [],
            "texts": [],
        }
        self._scores: dict[str, list[tuple[int, np.ndarray]]] = {}
        self._sources, self._groups = _Numbers(), _Numbers()
        self._count = 0

    def add(self, chunk: TokenChunk) -> None:
        """Appends rows."""
        if not len(chunk.indices):
            return
        self.folder.mkdir(exist_ok=True)
        for name, (values, lengths) in chunk.ids.items():
            if name not in self._files:
                self._files[name] = open(self.folder / f"{name}.values.npy", "wb")  # noqa: SIM115  # until finish
                _write_header(self._files[name], 0)
            self._files[name].write(values.tobytes())
            self._lengths.setdefault(name, []).append(lengths)
        for name, parts in self._arrays.items():
            parts.append(getattr(chunk, name))
        for name, values in chunk.scores.items():
            self._scores.setdefault(name, []).append((self._count, values))
        self._sources.add(chunk.sources)
        self._groups.add(chunk.groups)
        self._count += len(chunk.indices)

    def close(self) -> None:
        """Closes the files, whether they are complete or not."""
        for file in self._files.values():
            file.close()

    def finish(self) -> Written:
        """Completes the files, and says what is known of all rows."""
        labels, indices, prompts, rows, texts = (
            np.concatenate(parts) if parts else np.zeros((0, 2)) for parts in self._arrays.values()
        )
        if not self._count:
            return Written(table=None, prompts=prompts, rows=rows, labels=labels)
        for name, file in self._files.items():
            offsets = np.concatenate([[0], *self._lengths.pop(name)]).cumsum(dtype=np.int64)
            _write_header(file, int(offsets[-1]))
            self._save(f"{name}.offsets", offsets)
        self.close()
        assert (labels < 0).all() or (labels >= 0).all(), "only some of the rows have labels"
        if labels[0] >= 0:
            self._save("labels", labels.astype(bool))
        for name, parts in self._scores.items():
            values = np.full(self._count, np.nan, dtype=np.float32)
            for start, part in parts:
                values[start : start + len(part)] = part
            self._save(f"score.{name}", values)
        self._save("prompts", numbered(prompts))
        self._save("texts", texts)
        self._save("indices", indices)
        self._save("sources", np.concatenate(self._sources.parts))
        self._save("groups", np.concatenate(self._groups.parts))
        names = {"sources": list(self._sources.known), "groups": list(self._groups.known)}
        (self.folder / "names.json").write_text(json.dumps(names))
        table = TokenTable.load(self.folder)
        legs = {
            leg: table.legs[leg] for leg in (name.removeprefix("leg.") for name in self._files) if leg in table.legs
        }
        return Written(table=replace(table, legs=legs), prompts=prompts, rows=rows, labels=labels)

    def _save(self, name: str, values: np.ndarray) -> None:
        np.save(self.folder / f"{name}.npy", values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a ``SplitWriter`` wrote."""

    table: TokenTable | None
    """None without a row."""
    prompts: np.ndarray
    """128 bits that say which rows have the same prompt tokens, (row, 2)."""
    rows: np.ndarray
    """128 bits that say which rows are the same, (row, 2)."""
    labels: np.ndarray
    """1 and 0, and −1 without a label, (row,)."""

    def __len__(self) -> int:
        return len(self.rows)


def _write_header(file: IO[bytes], length: int) -> None:
    """The beginning of an ``.npy`` file of token ids; numpy leaves room in it for any length."""
    file.seek(0)
    header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, {**header, "shape": (length,)})
