"""Duplicates: rows that are the same, and rows that are nearly the same.

Near duplicates are found by MinHash (Broder 1997) with banding (Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, 3.4), and every pair found is then checked exactly. Signatures are rensa's; what is kept of them, one number
for each row and band, lies on disk.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.errors import DataError
from data.rowstore import BATCH, RowView, numbered, rows_from
from data.shingles import grams, mixed
from data.store import cache_dir
from data.surveyed import Surveyed
from data.traits import pieces

PERMUTATIONS = 128
"""Of a signature, at most."""
RECALL = 0.995
"""Chance that a pair exactly at the threshold is looked at, at least; more similar pairs have a greater one."""
MOST_COMPARED = 64
"""Rows that stay with which one row is compared, at most: those that share most bands, the earliest first."""
SEED = 20


def later_copies(hashes: np.ndarray) -> np.ndarray:
    """Which rows have the hash of an earlier one, (row,).

    Args:
        hashes: uint64, (row, 2).
    """
    numbers = numbered(hashes)
    later = np.ones(len(numbers), dtype=bool)
    later[np.unique(numbers, return_index=True)[1]] = False
    return later


def same_answers(answers: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Which rows have a response that an earlier row has for the same prompt, (row,).

    Args:
        answers: hashes of prompt with response, uint64, (response,).
        answered: how many of them each row has, (row,).
    """
    rows = np.repeat(np.arange(len(answered)), answered)
    _, first, group = np.unique(answers, return_index=True, return_inverse=True)
    found = np.zeros(len(answered), dtype=bool)
    found[rows[rows > rows[first][group]]] = True
    return found


def answers_of_rows_that_stay(answers: np.ndarray, answered: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Which rows have a response that an earlier row which stays has for the same prompt, (row,).

    In the order of the rows, so that what leaves makes nothing else leave.

    Args:
        answers: hashes of prompt with response, uint64, (response,).
        answered: how many of them each row has, (row,).
        stays: which rows are considered, (row,).
    """
    found = np.zeros(len(answered), dtype=bool)
    rows = np.repeat(np.arange(len(answered)), answered)
    considered = stays[rows]
    rows, own = rows[considered], answers[considered]
    _, group, counts = np.unique(own, return_inverse=True, return_counts=True)
    several = counts[group] > 1  # only these can meet: of data without copies few rows, or none
    taken: set[int] = set()
    by_row: defaultdict[int, set[int]] = defaultdict(set)
    for row, number in zip(rows[several].tolist(), group[several].tolist(), strict=True):
        by_row[row].add(number)
    for row, numbers in by_row.items():
        if numbers & taken:
            found[row] = True
        else:
            taken |= numbers
    return found


def contradictory(compared: np.ndarray, side: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Which rows compare what another one compares with the opposite outcome, (row,).

    Args:
        compared: hashes of what is compared, (row, 2).
        side: 1, −1, or 0 where nothing is, (row,).
        stays: rows that are considered, (row,).
    """
    found = np.zeros(len(side), dtype=bool)
    places = np.flatnonzero(stays & (side != 0))
    group = numbered(compared[places])
    number = int(group.max(initial=-1)) + 1
    both = np.ones(number, dtype=bool)
    for which in (1, -1):
        both &= np.bincount(group[side[places] == which], minlength=number) > 0
    found[places] = both[group]
    return found


def banding(threshold: float) -> tuple[int, int]:
    """Bands and signature numbers in each, so that a pair of similarity ``threshold`` shares a band nearly surely.

        P(share a band) = 1 − (1 − Jʳ)ᵇ

    The most numbers r for which that is at least ``RECALL`` at J = threshold, with b = ⌊128/r⌋ bands: the more numbers,
    the fewer pairs below the threshold are compared in vain. 0.8 gives 21 bands of 6.
    """
    for r in range(PERMUTATIONS, 1, -1):
        b = PERMUTATIONS // r
        if 1 - (1 - threshold**r) ** b >= RECALL:
            return b, r
    return PERMUTATIONS, 1


@dataclass(frozen=True, slots=True)
class Shingling:
    """What all batches share."""

    ngram: int
    bands: int
    numbers: int
    """Signature numbers of a band."""


@dataclass(frozen=True, slots=True)
class Shingled:
    """Distinct shingles of some rows."""

    values: np.ndarray
    """End to end, of each piece sorted, uint64, (shingle,)."""
    ends: np.ndarray
    """Where each piece ends, int64, (piece,)."""
    pieces: np.ndarray
    """How many pieces each row has, int64, (row,)."""
    names: list[int]
    """Says which rows have pieces of the same names, (row,)."""


def shingled_batch(how: Shingling, source: Any) -> Shingled:
    """Distinct word n-grams of every piece of rows; see ``data.traits.pieces``."""
    texts: list[str] = []
    counts: list[int] = []
    names: list[int] = []
    for row in rows_from(source):
        own = pieces(row)
        texts += own.values()
        counts.append(len(own))
        names.append(xxhash.xxh3_64_intdigest("\0".join(own).encode()))
    flat, ends = grams(texts, how.ngram)
    # One sort for all: pieces by number, shingles of a piece by value, and of equal neighbours the first.
    piece = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    order = np.lexsort((flat, piece))
    flat, piece = flat[order], piece[order]
    new = np.ones(len(flat), dtype=bool)
    new[1:] = (flat[1:] != flat[:-1]) | (piece[1:] != piece[:-1])
    sizes = np.bincount(piece[new], minlength=len(ends))
    return Shingled(flat[new], sizes.cumsum(), np.array(counts, dtype=np.int64), names)


def _library() -> Any:
    """rensa, which is only needed here."""
    try:
        return importlib.import_module("rensa")
    except ImportError:
        raise DataError(
            "near duplicates are found with the package rensa, which is not installed; pip install rensa, or leave "
            "near_duplicates out (--no_near)"
        ) from None


def banded_batch(how: Shingling, source: Any) -> np.ndarray:
    """A hash of each band of each row's signature, uint64, (band, row): rows that share one are looked at."""
    found = shingled_batch(how, source)
    place = np.concatenate([np.arange(count) for count in found.pieces] or [np.arange(0)]).astype(np.uint64)
    # The same words in prompt and response are different shingles.
    tagged = mixed(found.values ^ np.repeat(mixed(place + np.uint64(1)), np.diff(found.ends, prepend=0)))
    last = found.pieces.cumsum() - 1
    rows = np.concatenate([[0], found.ends[last]]).astype(np.uint64)
    signatures = _library().RMinHash.digest_matrix_from_flat_token_hashes(
        tagged, rows, num_perm=how.bands * how.numbers, seed=SEED
    )
    matrix = np.array(signatures.to_rows(), dtype=np.uint64).reshape(len(rows) - 1, how.bands, how.numbers)
    hashed = np.zeros(matrix.shape[:2], dtype=np.uint64)
    for number in range(how.numbers):
        hashed = mixed(hashed ^ matrix[:, :, number])
    return np.ascontiguousarray(hashed.T)


def near_copies(rows: Surveyed, stays: np.ndarray, *, threshold: float, ngram: int) -> np.ndarray:
    """Which rows are nearly the same as an earlier one that stays, (row,).

        near(a, b)  ⇔  J(aₖ, bₖ) ≥ threshold for every piece k,    J(A, B) = |A ∩ B| / |A ∪ B|

    with pieces prompt and each response (scored responses together), as sets of word n-grams: rows that only have their
    prompt in common are not near. In the order of the rows, each is compared with those that stay and share a band with
    it; of pairs at the threshold 99.5 % do, and of more similar ones more.

    Args:
        rows: all rows.
        stays: which of them are considered, (row,).
        threshold: least similarity, in [0.5, 1].
        ngram: words of a shingle.
    Raises:
        DataError: the package rensa is not installed.
    """
    _library()
    found = np.zeros(len(rows), dtype=bool)
    places = np.flatnonzero(stays)
    copies = later_copies(rows.traits.contents[places])
    unique = places[~copies]
    bands, numbers = banding(threshold)
    how = Shingling(ngram, bands, numbers)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bands-", dir=cache_dir()) as folder:
        meets = _meets(rows, unique, how, Path(folder))
        if len(meets.rows):
            view = rows.rows.take(unique[meets.rows])
            shingled = rows.workers.map(shingled_batch, how, view.sources(BATCH))
            with _Kept(Path(folder) / "shingles") as kept:
                near = _greedy(_each(shingled), meets.buckets, kept, threshold)
            found[unique[meets.rows[near]]] = True
    found[places[copies]] = True  # the same as an earlier row: near it, or near what that one is near
    return found


@dataclass(frozen=True, slots=True)
class _Meets:
    """Rows that share a band with another one."""

    rows: np.ndarray
    """Their places, (row,)."""
    buckets: np.ndarray
    """For each band which other rows it is shared with, as a number; −1 where none, int32, (row, band)."""


def _meets(rows: Surveyed, places: np.ndarray, how: Shingling, folder: Path) -> _Meets:
    number = len(places)
    view: RowView = rows.rows.take(places)
    if number < 2:
        return _Meets(np.arange(0), np.zeros((0, how.bands), dtype=np.int32))
    hashed = np.memmap(folder / "bands", dtype=np.uint64, mode="w+", shape=(how.bands, number))
    start = 0
    for part in rows.workers.map(banded_batch, how, view.sources(BATCH)):
        hashed[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    several = np.zeros(number, dtype=bool)
    for band in range(how.bands):
        several |= _shared(np.asarray(hashed[band])) >= 0
    found = np.flatnonzero(several)
    buckets = np.empty((len(found), how.bands), dtype=np.int32)
    used = 0
    for band in range(how.bands):
        own = _shared(np.asarray(hashed[band])[found])
        buckets[:, band] = np.where(own >= 0, own + used, -1)
        used += int(own.max(initial=-1)) + 1
    return _Meets(found, buckets)


def _shared(hashes: np.ndarray) -> np.ndarray:
    """A number for each hash that occurs more than once, −1 for the others, (row,)."""
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    numbers = np.where(counts > 1, np.cumsum(counts > 1) - 1, -1)
    return numbers[group]


Pieces = tuple[int, list[np.ndarray]]
"""Which names the pieces have, and the shingles of each."""


def _each(batches: Iterator[Shingled]) -> Iterator[Pieces]:
    for batch in batches:
        ends = [0, *batch.ends.tolist()]
        piece = 0
        for name, count in zip(batch.names, batch.pieces.tolist(), strict=True):
            yield name, [batch.values[a:b] for a, b in pairwise(ends[piece : piece + count + 1])]
            piece += count


def _greedy(rows: Iterator[Pieces], buckets: np.ndarray, kept: _Kept, threshold: float) -> np.ndarray:
    members: defaultdict[int, list[int]] = defaultdict(list)
    near = np.zeros(len(buckets), dtype=bool)
    for number, row in enumerate(rows):
        own = [bucket for bucket in buckets[number].tolist() if bucket >= 0]
        shared: defaultdict[int, int] = defaultdict(int)
        for bucket in own:
            for other in members.get(bucket, ()):
                shared[other] += 1
        candidates = sorted(shared, key=lambda other: (-shared[other], other))[:MOST_COMPARED]
        if any(_alike(row, kept[other], threshold) for other in candidates):
            near[number] = True
            continue
        place = kept.add(row)
        for bucket in own:
            if len(members[bucket]) < MOST_COMPARED:
                members[bucket].append(place)
    return near


def _alike(one: Pieces, other: Pieces, threshold: float) -> bool:
    return one[0] == other[0] and all(jaccard(a, b) >= threshold for a, b in zip(one[1], other[1], strict=True))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two arrays of distinct numbers; 1 where both are empty."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - both
    return both / either if either else 1.0


class _Kept:
    """Shingles of the rows that stay, on disk.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115  # as long as the ``with`` block
        self._places: list[tuple[int, int, tuple[int, ...]]] = []
        self._end = 0

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: Pieces) -> int:
        """Keeps a row's shingles; returns its number."""
        name, parts = row
        raw = b"".join(part.tobytes() for part in parts)
        self._file.write(raw)
        self._places.append((name, self._end, tuple(len(part) for part in parts)))
        self._end += len(raw)
        return len(self._places) - 1

    def __getitem__(self, number: int) -> Pieces:
        name, start, sizes = self._places[number]
        values = np.frombuffer(os.pread(self._file.fileno(), 8 * sum(sizes), start), dtype=np.uint64)
        return name, np.split(values, np.cumsum(sizes)[:-1])
