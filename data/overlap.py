"""Overlap with texts that a model is evaluated on: word n-grams that both have.

As GPT-3's authors looked for contamination (Brown et al. 2020, arXiv:2005.14165, appendix C): 13 words, in lower case
and without punctuation. What is short is not cut into grams but compared whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.reading import looks_local, read, version_of_files
from data.rowstore import BATCH, rows_from
from data.shingles import grams, words
from data.surveyed import Surveyed
from data.traits import plain
from objectives.rows import Row

SHORTEST = 5
"""Words below which a text of an evaluation set is passed over: equal prompts of four words say nothing."""
TEXTS = 2000
"""Texts handled at a time."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What evaluation sets hold."""

    ngram: int
    grams: np.ndarray
    """Hashes of all their word n-grams, and of shorter texts as a whole; sorted, distinct, uint64, (gram,)."""
    texts: int
    passed_over: int
    """Texts of fewer than ``SHORTEST`` words."""


@lru_cache(maxsize=2)
def evaluated(against: tuple[str, ...], ngram: int, versions: tuple[str | None, ...]) -> Evaluated:
    """All texts of evaluation sets as n-grams.

    Args:
        against: files or folders, or Hub ids; of rows every text counts, however deep it lies.
        ngram: words of a gram.
        versions: of the files, so that one that has changed is read again.
    Raises:
        DataError: one of them can't be read, or none holds a text that is long enough.
    """
    assert len(versions) == len(against)
    found: list[np.ndarray] = []
    count = short = 0
    batch: list[str] = []

    def add() -> None:
        if batch:
            found.append(np.unique(grams(batch, ngram)[0]))
            batch.clear()

    for name in against:
        for text in (text for raw in read(name, split=split_of(name)) for text in _texts(raw)):
            if len(words(text)) < SHORTEST:
                short += 1
                continue
            count += 1
            batch.append(text)
            if len(batch) == TEXTS:
                add()
    add()
    if not count:
        raise DataError(
            f"{', '.join(against)}: no text of at least {SHORTEST} words to compare with; name the files of the "
            "evaluation sets"
        )
    return Evaluated(ngram, np.unique(np.concatenate(found)), count, short)


def split_of(name: str) -> str:
    """Which split of an evaluation set is read: all of a file, the test split of what is on the Hub."""
    return "train" if looks_local(name) else "test"


def _texts(raw: Any) -> Iterator[str]:
    if isinstance(raw, str):
        yield raw
    elif isinstance(raw, Mapping):
        for value in raw.values():
            yield from _texts(value)
    elif isinstance(raw, Sequence) and not isinstance(raw, bytes):
        for value in raw:
            yield from _texts(value)


def versions_of(against: Sequence[str]) -> tuple[str | None, ...]:
    """What changes when a file may have changed; None of what is not a file here."""
    return tuple(version_of_files(Path(name).expanduser()) if looks_local(name) else None for name in against)


def overlapping_batch(sets: Evaluated, source: Any) -> np.ndarray:
    """Which rows have an n-gram of the evaluation sets in prompt or responses, (row,)."""
    rows = rows_from(source)
    texts = [text for row in rows for text in _of_row(row)]
    counts = [1 + len(row.responses) + len(row.candidates) for row in rows]
    flat, ends = grams(texts, sets.ngram)
    place = np.minimum(np.searchsorted(sets.grams, flat), len(sets.grams) - 1)
    hits = np.concatenate([[0], (sets.grams[place] == flat).cumsum()])
    last = ends[np.cumsum(counts) - 1] if rows else np.arange(0)
    return np.diff(hits[np.concatenate([[0], last]).astype(np.int64)]) > 0


def _of_row(row: Row) -> list[str]:
    return [plain(row.prompt), *map(plain, row.responses.values()), *(plain(each.text) for each in row.candidates)]


def overlaps(rows: Surveyed, against: Sequence[str], ngram: int) -> np.ndarray:
    """Which rows share a word n-gram with an evaluation set, (row,).

    Raises:
        DataError: see ``evaluated``.
    """
    sets = evaluated(tuple(against), ngram, versions_of(against))
    parts = list(rows.workers.map(overlapping_batch, sets, rows.rows.sources(BATCH)))
    return np.concatenate([np.zeros(0, dtype=bool), *parts])
