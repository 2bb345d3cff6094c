"""Tokenised rows on disk: prepared once, cached by content, shared by all ranks.

Rows live as flat arrays that are memory-mapped, so that eight ranks of a node share one copy.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from data.tokens import TokenRow

PIECE = 2**22
"""Numbers of an array that are read at a time."""
FORMAT = 5
"""Raise when the meaning of stored arrays changes; older caches are then not found."""


def cache_dir() -> Path:
    """``ALIGN_CACHE``, or ``~/.cache/align``."""
    return Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align")


def digest(*parts: object) -> str:
    """A 128-bit content hash of JSON-able parts, bytes and arrays (which count as their bytes), in hex."""
    state = xxhash.xxh3_128()
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(part.nbytes.to_bytes(8, "little"))
            for piece in _pieces(part):
                state.update(piece)
            continue
        raw = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, ensure_ascii=False).encode()
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.hexdigest()


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array; of a mapped one without keeping in memory what was read."""
    flat = np.ascontiguousarray(array).reshape(-1)
    mapped = getattr(array, "_mmap", None)
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE].data.cast("B")
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Sequences of unequal length as one flat array and offsets."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Length of every sequence."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Ragged:
        """The given sequences, in the given order."""
        starts, ends = np.asarray(self.offsets)[rows], np.asarray(self.offsets)[rows + 1]
        parts = [self.values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        values = np.concatenate([np.zeros(0, dtype=self.values.dtype), *parts])
        return Ragged(values, np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64))

    @staticmethod
    def of(sequences: Sequence[Sequence[int]]) -> Ragged:
        """Packs lists of token ids."""
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences], dtype=np.int64)]).astype(np.int64)
        flat = np.fromiter((t for s in sequences for t in s), dtype=np.int32, count=int(offsets[-1]))
        return Ragged(flat, offsets)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """All rows of a dataset as token ids."""

    prompts: Ragged
    legs: Mapping[str, Ragged]
    labels: np.ndarray | None = None
    """Whether each row's completion is desirable (bool), where all rows say so."""
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Scores by leg or attribute, float32, NaN where a row has none; those that were asked for."""

    def __len__(self) -> int:
        return len(self.prompts)

    @staticmethod
    def of(rows: Sequence[TokenRow], legs: Sequence[str]) -> TokenTable:
        """Packs token rows; every row has every leg, and all have a label or none has."""
        labels = [row.label for row in rows if row.label is not None]
        assert not labels or len(labels) == len(rows), "only some of the rows have labels"
        return TokenTable(
            Ragged.of([row.prompt for row in rows]),
            {leg: Ragged.of([row.legs[leg] for row in rows]) for leg in legs},
            np.array(labels, dtype=bool) if labels else None,
            {
                name: np.array([row.scores.get(name, math.nan) for row in rows], dtype=np.float32)
                for name in dict.fromkeys(name for row in rows for name in row.scores)
            },
        )

    def shared_lengths(self) -> np.ndarray:
        """Positions of every row when its prompt is computed once."""
        return self.prompts.lengths() + sum(leg.lengths() for leg in self.legs.values())

    def separate_lengths(self) -> np.ndarray:
        """Positions of every row when each response is a sequence of its own, padded to its longest."""
        longest = np.max([leg.lengths() for leg in self.legs.values()], axis=0)
        return (self.prompts.lengths() + longest) * len(self.legs)

    def take(self, rows: np.ndarray) -> TokenTable:
        """The given rows, in the given order."""
        labels = None if self.labels is None else np.asarray(self.labels)[rows]
        scores = {name: np.asarray(values)[rows] for name, values in self.scores.items()}
        legs = {name: leg.take(rows) for name, leg in self.legs.items()}
        return TokenTable(self.prompts.take(rows), legs, labels, scores)

    def fingerprint(self) -> str:
        """Content hash of all token ids, boundaries, scores and labels."""
        return digest(*(part for name, array in self._arrays() for part in (name, array)))

    def _arrays(self) -> list[tuple[str, np.ndarray]]:
        arrays = [("prompt.values", self.prompts.values), ("prompt.offsets", self.prompts.offsets)]
        for name, leg in sorted(self.legs.items()):
            arrays += [(f"leg.{name}.values", leg.values), (f"leg.{name}.offsets", leg.offsets)]
        arrays += [(f"score.{name}", values) for name, values in sorted(self.scores.items())]
        return arrays if self.labels is None else [*arrays, ("labels", self.labels)]

    def save(self, folder: Path) -> None:
        """Writes the arrays as ``.npy`` files."""
        for name, array in self._arrays():
            np.save(folder / f"{name}.npy", array)

    @staticmethod
    def load(folder: Path) -> TokenTable:
        """Maps the arrays of a folder that ``save`` wrote."""

        def ragged(name: str) -> Ragged:
            return Ragged(*(np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("values", "offsets")))

        legs = sorted(path.name.split(".")[1] for path in folder.glob("leg.*.values.npy"))
        labels = folder / "labels.npy"
        return TokenTable(
            ragged("prompt"),
            {leg: ragged(f"leg.{leg}") for leg in legs},
            np.load(labels, mmap_mode="r") if labels.is_file() else None,
            {path.name[6:-4]: np.load(path, mmap_mode="r") for path in sorted(folder.glob("score.*.npy"))},
        )


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes ``folder`` appear complete or not at all: ``fill`` gets a temporary one, which is renamed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's are private, and a cache may be shared
        fill(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
