"""Datasets with planted faults, and independent counts of them: what the doctor's tests share."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.filtering import surveyed
from data.rowstore import RowStore
from data.sources import Source, load_rows
from data.surveyed import Surveyed
from data.workers import Workers

VOCABULARY = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("a", "e", "i", "o", "u", "an", "or", "us")]


def sentence(rng: random.Random, number: int) -> str:
    """So many random words."""
    return " ".join(rng.choice(VOCABULARY) for _ in range(number))


def pairs(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs without a fault, of which the two responses are equally long."""
    rng = random.Random(seed)
    found = []
    for i in range(number):
        chosen = sentence(rng, 20)
        found.append({"prompt": f"{i} {sentence(rng, 12)}?", "chosen": f" {chosen}.", "rejected": f" {chosen[::-1]}."})
    return found


def write(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def survey(*paths: Path, held: Path | None = None) -> Surveyed:
    """The rows of files, in this process."""
    store, workers = RowStore(paths[0].parent / "store"), Workers(0)
    load = [load_rows(Source(dataset_name=str(path)), store=store, workers=workers) for path in paths]
    evaluated = [] if held is None else [load_rows(Source(dataset_name=str(held)), store=store, workers=workers)]
    return surveyed(load, evaluated, workers)


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    """By another way than ``data.shingles``: sets of tuples."""
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)} or {tuple(found) or (text,)}


def jaccard(one: set[Any], other: set[Any]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    return len(one & other) / len(one | other)


def near_by_brute_force(rows: Sequence[dict[str, Any]], threshold: float, n: int) -> set[int]:
    """Numbers of rows near an earlier one that stays, every pair compared."""
    own = [[shingles(row[name], n) for name in ("prompt", "chosen", "rejected")] for row in rows]
    stays: list[int] = []
    near = set()
    for i in range(len(rows)):
        if any(all(jaccard(a, b) >= threshold for a, b in zip(own[i], own[j], strict=True)) for j in stays):
            near.add(i)
        else:
            stays.append(i)
    return near


def altered(text: str, words: int, rng: random.Random) -> str:
    """The text with so many words exchanged."""
    found = text.split(" ")
    for place in rng.sample(range(1, len(found) - 1), words):
        found[place] = rng.choice(VOCABULARY)
    return " ".join(found)
